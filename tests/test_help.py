"""The help pages say what the nodes have."""

import asyncio
import pathlib

import pytest

pytestmark = pytest.mark.comfy

DOCS = pathlib.Path(__file__).resolve().parents[1] / "web" / "docs"


def test_every_input_output_and_choice_is_explained(comfyui):
    from livediffusion.nodes.extension import LiveDiffusionExtension

    missing = []
    for node in asyncio.run(LiveDiffusionExtension().get_node_list()):
        schema = node.define_schema()
        page = (DOCS / f"{schema.node_id}.md").read_text("utf-8")
        said = {cell.strip() for line in page.splitlines() for cell in line.split("|")}
        words = [*("## Wiring", "## Errors"), *(i.id for i in schema.inputs)]
        missing += [(schema.node_id, word) for word in words if word not in said]
        shown = [o.display_name for o in schema.outputs]
        # which files there are is the user's
        files = [("LiveTensorRTLoader", "engine")]
        combos = [
            i
            for i in schema.inputs
            if i.id not in ("file", "result") and (schema.node_id, i.id) not in files
        ]
        shown += [choice for i in combos for choice in getattr(i, "options", None) or []]
        missing += [(schema.node_id, word) for word in shown if word not in page]
    assert not missing
