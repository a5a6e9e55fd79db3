"""Live reads the graph as Run sends it, with what other packs do to it on the way."""

import importlib.util
import pathlib

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

VERSION = "Number(window.live.views()[0].dataset.version)"
SOON = 400  # ms in which an edit would have been noticed

# A pack of the kind of "Anything Everywhere": it connects what has no wire, in app.graphToPrompt,
# and only while app.queuePrompt runs; it passes on nothing but the graph it is given. Another lets
# in one at a time.
PACKS = """(() => {
  const { queuePrompt, graphToPrompt } = app;
  let queueing = 0;
  const packs = (window.live.packs = { queued: 0, read: 0, toggle: true, at_once: 0, most: 0 });
  app.graphToPrompt = async function () {
    packs.read++;
    packs.most = Math.max(packs.most, ++packs.at_once);
    const [graph] = arguments;
    const view = app.graph.findNodesByType('LiveView')[0];
    const wires = queueing && packs.toggle && view?.inputs[0].link == null;
    if (wires) app.graph.getNodeById(packs.from).connect(0, view, 0);
    try {
      return await graphToPrompt.call(app, graph);
    } finally {
      packs.at_once--;
      if (wires) view.disconnectInput(0);
    }
  };
  const inner = async function (number, count) {
    queueing++;
    try { return await queuePrompt.call(this, number, count) } finally { queueing-- }
  };
  let turn = Promise.resolve();
  app.queuePrompt = function () {
    const wait = turn.catch(() => {}).then(() => new Promise((done) => setTimeout(done, 5)));
    return (turn = wait.then(() => inner.apply(app, arguments)));
  };
  packs.undo = () => Object.assign(app, { queuePrompt, graphToPrompt });
})()"""


def seeded():
    """A camera and a view without a wire, an inverter, and a seed that changes with each run."""
    made = tools.through()
    made["nodes"][0]["outputs"][0]["links"] = []
    made["nodes"][1]["inputs"][0]["link"] = None
    made["links"] = []
    extra = tools.workflow(
        {
            3: ("ImageInvert", [60, 600], [200, 50], [], [("image", "IMAGE")],
                [("IMAGE", "IMAGE")]),
            4: ("PrimitiveInt", [460, 660], [260, 90], [7, "randomize"], [], [("INT", "INT")]),
        },
        [],
    )  # fmt: skip
    made["nodes"] += extra["nodes"]
    return made


def test_what_a_pack_adds_while_queueing_is_live_too(page):
    page.load(seeded())
    page.get("""(() => { const [camera, , invert, seed] = [1, 2, 3, 4].map((id) =>
        app.graph.getNodeById(id)); camera.connect(0, invert, 0);
        window.live.told = 0;
        for (const w of seed.widgets) for (const name of ['beforeQueued', 'afterQueued']) {
          const own = w[name];
          w[name] = function () {
            window.live.told++; return own?.apply(this, arguments) } } })()""")
    page.get(PACKS)
    sent = []
    page.page.on("request", lambda r: sent.append(r.url) if r.method == "POST" else None)
    try:
        page.get("void (window.live.packs.from = 1)")
        assert page.get("app.graphToPrompt().then((g) => 'image' in g.output['2'].inputs)") is False
        page.live()
        assert page.get(VERSION) == 1
        # neither the looks at the graph nor what touches it not is an edit, or queues anything
        reads = page.get("window.live.packs.read")
        for _ in range(3):
            page.get("document.dispatchEvent(new Event('pointerup'))")
            page.page.wait_for_timeout(SOON // 3)
        page.page.wait_for_timeout(SOON)
        assert page.get("window.live.packs.read") > reads
        assert page.get(VERSION) == 1
        # the pack does another thing, though no node changed: the next look sends it
        page.get("void (window.live.packs.from = 3)")
        page.get("document.dispatchEvent(new Event('change'))")
        page.wait(f"{VERSION} === 2")
        page.get("app.graph.getNodeById(1).widgets[2].value = 272")
        page.wait("window.live.views()[0].width === 272")
        seed = page.get("[app.graph.getNodeById(4).widgets[0].value, window.live.told]")
        assert seed == [7, 0]
        # a run of the user's own, in the middle of looks at the graph, is one run
        page.get("document.dispatchEvent(new Event('pointerup'))")
        page.page.wait_for_timeout(58)
        page.get("app.queuePrompt(0)")
        page.page.wait_for_timeout(SOON)
        posts = [url.rpartition("/")[2] for url in sent]
        assert posts.count("prompt") == 1 and posts.count("start") == 1
        assert page.get("window.live.told") > 0
        assert page.get("window.live.packs.most") == 1
        assert page.get("app.graph.getNodeById(2).inputs[0].link") is None
        assert not page.ours
        # without the pack's wire there is no live graph any more, and that is said
        page.get("window.live.untoast()")
        page.get("(window.live.packs.toggle = false)")
        page.get("document.dispatchEvent(new Event('change'))")
        page.wait("window.live.toasts().join().includes('Not changed')")
        page.stop()
    finally:
        page.get("window.live.packs.undo()")


def test_a_pack_that_lets_nothing_through_is_left_out(page):
    page.load(tools.through())
    page.get("""(() => { window.live.queuePrompt = app.queuePrompt;
        app.queuePrompt = async () => false })()""")
    try:
        page.live()
        page.stop()
    finally:
        page.get("void (app.queuePrompt = window.live.queuePrompt)")
    assert not page.ours
