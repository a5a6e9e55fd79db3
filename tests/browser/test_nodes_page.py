"""Every way in which our nodes come and go, and what the page keeps of them after each."""

import importlib.util
import pathlib

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
through = tools.through

# what our files listen to for a node, by its kind, and how much they do again and again
COUNT = """(() => {
  const ours = () => new Error().stack.toLowerCase().includes('livediffusion')
  const kinds = ['devicechange', 'visibilitychange', 'opened', 'closed', 'lost']
  const heard = new Map(), timers = new Set(), { prototype } = EventTarget
  const { addEventListener, removeEventListener } = prototype
  const of = (target, kind) => {
    if (!heard.has(target)) heard.set(target, Object.fromEntries(kinds.map((k) => [k, new Set()])))
    return heard.get(target)[kind]
  }
  prototype.addEventListener = function (kind, then, ...more) {
    if (ours()) of(this, kind)?.add(then)
    return addEventListener.call(this, kind, then, ...more)
  }
  prototype.removeEventListener = function (kind, then, ...more) {
    heard.get(this)?.[kind]?.delete(then)
    return removeEventListener.call(this, kind, then, ...more)
  }
  const { setInterval, clearInterval } = window
  window.setInterval = (...from) => {
    const made = setInterval(...from)
    if (ours()) timers.add(made)
    return made
  }
  window.clearInterval = (made) => (timers.delete(made), clearInterval(made))
  window.kept = () => [timers.size, ...kinds.map(
    (kind) => [...heard.values()].reduce((sum, all) => sum + all[kind].size, 0))]
})()"""

SETUP = """(() => {
  const root = () => app.rootGraph ?? app.graph
  const every = (graph, found = []) => {
    for (const n of graph.nodes) n.subgraph ? every(n.subgraph, found) : found.push(n)
    return found
  }
  const box = (n) => n.widgets.find((w) => w.name.startsWith('livediffusion_')).element
  Object.assign(window.live, {
    all: (kind) => every(root()).filter((n) => n.comfyClass === kind),
    shown: (n) => JSON.stringify([
      n.widgets.filter((w) => w.hidden).map((w) => w.name),
      [...box(n).querySelectorAll('.livediffusion-line button, .livediffusion-line select')]
        .map((e) => e.tagName + (e.tagName === 'BUTTON' ? e.textContent : e.value))
    ]),
    copy: (n) => app.canvas.copyToClipboard([n]),
    paste: () => app.canvas.pasteFromClipboard({}),
    inside: (n) => app.canvas.graph.convertToSubgraph(new Set([n])),
    // as undo does it
    anew: () => app.loadGraphData(root().serialize(), false, false,
      app.extensionManager.workflow.activeWorkflow),
    press: (n, text) => [...box(n).querySelectorAll('button')]
      .find((e) => e.textContent === text).click()
  })
})()"""


def test_a_copy_shows_what_belongs_to_its_source(page):
    page.get(SETUP)
    for name in ("address", "screen", "phone", "device", "file", "ndi"):
        made = through(source=name)
        made["nodes"][0]["widgets_values"] += ["there", "there", "there"]
        page.load(made)
        (mine,) = page.get("window.live.all('LiveCamera').map(window.live.shown)")
        page.get("(window.live.copy(window.live.all('LiveCamera')[0]), window.live.paste())")
        page.get("void window.live.inside(window.live.all('LiveCamera')[0])")
        # the copy, and the one that went into a subgraph
        assert page.get("window.live.all('LiveCamera').map(window.live.shown)") == [mine] * 2, name
    assert not page.ours


CAMERA = "window.live.all('LiveCamera')[0]"
VIEW = "window.live.all('LiveView')[0]"


@pytest.fixture
def counted(browser, site):
    page = browser.new_page()
    page.add_init_script(COUNT)
    made = tools.Page(page, site)
    try:
        made.open()
        made.get(SETUP)
        yield made
    finally:
        page.close()


def test_nothing_is_left_of_a_node_that_has_gone(counted):
    page = counted

    def same(wanted, cameras):
        try:
            page.wait(f"window.live.cameras() === {cameras} && String(window.kept()) === "
                      f"'{','.join(map(str, wanted))}'", 5)  # fmt: skip
        except AssertionError as error:
            raise AssertionError(f"{wanted} before, {page.get('window.kept()')} now") from error

    def look():
        page.get(f"window.live.press({CAMERA}, 'Try')")
        same(looking, 1)

    page.load(through())
    idle = page.get("window.kept()")
    looking = [idle[0] + 1, *idle[1:]]  # it paints
    look()
    # copied, and not pasted
    for _ in range(3):
        page.get(f"void window.live.copy({CAMERA})")
    same(looking, 1)
    page.get("void window.live.paste()")
    assert page.get("window.live.all('LiveCamera').length") == 2
    page.get("app.graph.remove(window.live.all('LiveCamera')[1])")
    same(looking, 1)
    # into a subgraph; there, loaded anew
    page.get(f"void window.live.inside({CAMERA})")
    same(idle, 0)
    for _ in range(2):
        look()
        page.get("window.live.anew()")
        same(idle, 0)
    # another workflow
    look()
    page.load(through())
    same(idle, 0)
    # the subgraph is removed, with what is in it
    page.get(f"void window.live.inside({CAMERA})")
    look()
    page.get("app.graph.remove(app.graph.nodes.find((n) => n.subgraph))")
    page.wait("window.live.cameras() === 0", 5)
    page.load(through())
    same(idle, 0)
    # and a run, with copies made while it goes on
    page.live()
    running = page.get("window.kept()")
    for kind in ("LiveCamera", "LiveView"):
        page.get("void window.live.copy(window.live.all(a)[0])", kind)
    page.get("window.live.anew()")
    drawn = "Number(window.live.views()[0]?.dataset.frames ?? 0)"
    page.wait(f"{drawn} > 3")
    same(running, 2)
    page.stop()
    same(idle, 0)
    assert not page.ours


@pytest.mark.parametrize("modern", [False, True])
def test_a_node_that_is_made_anew_shows_its_own(counted, modern):
    """Nodes 2.0 goes on with what it showed of the one before, which has the same id."""
    page = counted
    page.nodes2(modern)
    try:
        page.load(through())
        page.live()
        for _ in range(4):
            page.get("void window.live.anew()")
            page.page.wait_for_timeout(700)
            drawn = page.get("Number(window.live.views()[0]?.dataset.frames ?? 0)")
            page.wait(f"Number(window.live.views()[0]?.dataset.frames ?? 0) > {drawn + 3}", 10)
            for kind in ("LiveCamera", "LiveView"):
                assert page.get(
                    """[...window.live.all(a)[0].widgets].find((w) =>
                    w.name.startsWith('livediffusion_')).element.isConnected""", kind
                ), kind  # fmt: skip
        page.stop()
    finally:
        page.nodes2(False)


def moves(popup):
    """Its picture is another one soon."""
    picture = "document.querySelector('.livediffusion-output canvas')?.toDataURL()"
    there = popup.evaluate(picture)
    popup.wait_for_function(f"(a) => {picture} && {picture} !== a", arg=there, timeout=10000)


def opened(page):
    with page.page.expect_popup() as found:
        page.get(f"window.live.press({VIEW}, 'Window')")
    return found.value


def test_a_window_stays_while_nodes_are_made_anew_and_when_it_is_reloaded(page):
    page.get(SETUP)
    names = set()
    for deep in (False, True):
        page.load(through())
        if deep:
            page.get(f"void window.live.inside({VIEW})")
        popup = opened(page)
        names.add(popup.evaluate("window.name"))
        page.page.click(".livediffusion-live")
        moves(popup)
        popup.dblclick(".livediffusion-stage")
        popup.wait_for_function("() => document.fullscreenElement")
        for _ in range(2):
            page.get("window.live.anew()")
            page.wait("window.live.state() === 'live'")
            moves(popup)
        assert popup.evaluate("Boolean(document.fullscreenElement)")
        # a reload empties it; the next picture, or the button, fills it again
        popup.reload()
        moves(popup)
        page.stop()
        popup.reload()
        assert not popup.query_selector("canvas")
        page.get(f"window.live.press({VIEW}, 'Window')")
        popup.wait_for_function("() => document.querySelector('canvas').width === 256")
        # with another workflow it goes
        page.load(through())
        page.page.wait_for_timeout(50)
        assert popup.is_closed()
    assert len(names) == 2
    assert not page.ours
