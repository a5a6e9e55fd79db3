"""A workflow becomes the prompt that ComfyUI's page makes of it, also without a page."""

import copy
import importlib.util
import json
import pathlib

import pytest
from serving import served

pytestmark = [pytest.mark.comfy, pytest.mark.server]

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = ROOT / "tests" / "serve" / "saved_workflows.py"
spec = importlib.util.spec_from_file_location("saved_workflows", SHAPES)
saved_workflows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(saved_workflows)

PROMPT = "(async () => { await app.loadGraphData(a); return (await app.graphToPrompt()).output })()"


@pytest.fixture(scope="module")
def info(site):
    return site.json("/object_info")


def theirs(page, workflow):
    sent = page.get(PROMPT, copy.deepcopy(workflow))
    # the button is drawn anew with the graph, and who uses the page next looks at its state
    page.wait("window.live.state() === 'idle'")
    return sent


def ours(workflow, info):
    """With what a text chooses of {a|b}, which the page does in the same step."""
    exposed = served("workflow.exposed").Exposed.load(workflow, info)
    return exposed.graph({})


def numbered_alike(graph, by):
    """The page gives nodes of two subgraphs that have the same number new ones."""
    names = {}
    for id, other in zip(sorted(graph, key=key_of(graph)), sorted(by, key=key_of(by)), strict=True):
        names[id] = other
    text = json.dumps(graph)
    for id, other in names.items():
        text = text.replace(f'"{id}"', f'"{other}"')
    return json.loads(text)


def key_of(graph):
    return lambda id: (id.partition(":")[0], graph[id]["class_type"])


@pytest.mark.parametrize("name", sorted(saved_workflows.cases()))
def test_is_what_the_page_sends(page, info, name):
    workflow = saved_workflows.cases()[name]
    sent, made = theirs(page, workflow), ours(workflow, info)
    assert len(sent) > 1
    if name == "same_ids":
        assert made != sent
        made = numbered_alike(made, sent)
    assert made == sent


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_templates_are_what_the_page_sends(page, info, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    graph = served("workflow.prompt").to_prompt(workflow, info).graph
    assert graph == theirs(page, workflow)
