"""A run that goes on without its page, in real pages: kept, left, come to again, stopped."""

import importlib.util
import pathlib
import time

import pytest
from clock import Limit
from films import write_gif

pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
fresh, through = tools.fresh, tools.through

FILM = "kept.gif"


def workflow(name, **settings):
    made = through(source="file", file=FILM, **settings)
    return {**made, "id": name}


@pytest.fixture
def film(site):
    yield write_gif(site.base / "input" / FILM, 4, 50)
    for run in runs(site):
        site.json("/livediffusion/end", {"run": run["run"]})


def runs(site):
    return site.json("/livediffusion/runs")["runs"]


def until(condition, seconds=30):
    limit = Limit(seconds)
    while not (found := condition()):
        assert not limit.over, "it did not happen in time"
        time.sleep(0.05)
    return found


def command(page, name):
    page.get("window.app.extensionManager.command.execute(a)", f"livediffusion.{name}")


def live(page):
    page.wait("window.live.state() === 'live'")
    page.wait("Number(window.live.views()[0].dataset.frames) > 2")


def test_a_run_is_kept_left_come_to_again_and_stopped(shared, site, film):
    browser = shared.context()
    with fresh(browser, site) as page:
        page.load(workflow("one"))
        command(page, "keep")
        live(page)
        page.wait("window.live.toasts().some((text) => text.includes('kept running'))")
        assert not page.ours
    # its page is closed
    told = until(lambda: runs(site))[0]
    time.sleep(2.5)
    assert [run["run"] for run in runs(site)] == [told["run"]]
    assert (told["workflow"], told["state"]) == ("one", "live")
    with fresh(browser, site) as page:
        # whoever opens its workflow comes to it, without a press
        page.load(workflow("one"))
        live(page)
        tip = "document.querySelector('.livediffusion-live').getAttribute('aria-label')"
        page.wait(f"{tip}.includes('without a page')")
        page.wait("document.querySelector('.livediffusion-figures').textContent.includes('fps')")
        # an edit is everybody's
        page.get("""(() => { const [n] = app.graph.findNodesByType('LiveCamera');
            n.widgets.find((w) => w.name === 'width').value = 128 })()""")
        page.wait("Number(window.live.views()[0].dataset.version) === 2")
        # another workflow: the page leaves, the run does not
        page.load(workflow("two"))
        page.wait("window.live.state() === 'idle'")
        assert runs(site)[0]["state"] == "live"
        page.load(workflow("one"))
        live(page)
        page.stop()
        until(lambda: not runs(site))  # a stopped run ends with its picture
        assert not page.ours


def test_a_run_that_page_has_is_kept_and_stopped_from_another_workflow(shared, site, film):
    browser = shared.context()
    with fresh(browser, site) as page, fresh(browser, site) as other:
        page.load(workflow("three"))
        page.live()
        command(page, "keep")
        until(lambda: runs(site))
        page.wait("window.live.state() === 'live'")
        other.load(workflow("four"))
        command(other, "end")
        page.wait("window.live.state() === 'idle'")
        until(lambda: not runs(site))  # a stopped run ends with its picture
        # and what only a page sends is refused in words, with its node marked
        other.load(through())
        command(other, "keep")
        other.wait("window.live.toasts().some((text) => text.includes('without a page'))")
        other.wait("window.live.state() === 'idle'")
        until(lambda: not runs(site))  # a stopped run ends with its picture
        assert not page.ours


def test_a_page_stays_while_a_run_begins_anew(shared, site, film):
    with fresh(shared.context(), site) as page:
        page.load(workflow("five"))
        command(page, "keep")
        live(page)
        film.write_bytes(b"no film any more")
        page.wait("window.live.state() === 'again'")
        page.wait("window.live.toasts().some((text) => text.includes('started again'))")
        until(lambda: runs(site)[0]["failures"] >= 2)
        write_gif(film, 4, 50)
        page.get("window.live.untoast()")
        page.wait("window.live.state() === 'live'")
        seen = page.get("Number(window.live.views()[0].dataset.frames)")
        page.wait(f"Number(window.live.views()[0].dataset.frames) > {seen} + 2")
        assert runs(site)[0]["restarts"] >= 1
        page.stop()
        until(lambda: not runs(site))  # a stopped run ends with its picture
