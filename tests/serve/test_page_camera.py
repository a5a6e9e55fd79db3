"""The visitor's camera: refused, forgotten, unplugged in the line or in a run, or not wanted."""

import pathlib
import sys

import pytest
from chromium import launch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fakes import House
from pages import context, visiting

pytestmark = [pytest.mark.alone, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser(playwright):
    running, _ = launch(playwright)
    running.usual = context(running)
    yield running
    running.close()


def test_a_camera_that_does_not_open(browser):
    with House() as house, visiting(browser, house) as one:
        for name, sentence in (
            ("NotAllowedError", "camera symbol"), ("NotFoundError", "No camera was found"),
            ("NotReadableError", "another program"), ("AbortError", "before it gave a picture"),
            ("SecurityError", "does not open: no"),
        ):  # fmt: skip
            one.get("(window.seen.fails = a)", name)
            one.start()
            one.says(sentence, "problem")
            assert "Live" not in one.text("problem") and "ComfyUI" not in one.text("problem")
        assert not any(v.wants for v in house.visitors.values())
        one.get("(window.seen.fails = null)")
        one.run()


def test_who_is_asked_for_the_camera_may_leave_and_start_again(browser):
    """The browser's question may stay open, and some cameras never answer."""
    with House(("red",)) as house, visiting(browser, house) as one:
        one.get("""(() => { const devices = navigator.mediaDevices
            window.seen.get = devices.getUserMedia
            devices.getUserMedia = (wish) => new Promise((come, fail) => {
              window.seen.answer = () => window.seen.get.call(devices, wish).then(come)
              window.seen.refuse = () => fail(new DOMException('no', 'NotAllowedError')) }) })()""")
        one.start()
        one.phase("asking")
        one.page.click("#leave")
        one.phase("over")
        one.says("You have stopped", "lead")
        # an answer that comes after that is none to what is on the screen now
        one.get("window.seen.refuse()")
        one.page.wait_for_timeout(50)
        assert one.get("[document.body.dataset.phase, window.seen.lit()]") == ["over", 0]
        one.start()
        one.phase("asking")
        one.get("window.seen.answer()")
        one.phase("running")
        one.more()
        assert len(house.gates["r0red"].starts) == 1


def test_a_browser_that_keeps_nothing(browser):
    """Storage is blocked for the page: to look at it throws. And it has no crypto.randomUUID."""
    with House(("red",)) as house, visiting(browser, house, opened=False, locale="en-GB") as one:
        one.page.add_init_script("""for (const name of ['localStorage', 'sessionStorage'])
            Object.defineProperty(window, name, { get() {
              throw new DOMException('Access is denied', 'SecurityError') } });
            delete Crypto.prototype.randomUUID""")
        one.open()
        one.run()
        one.more()
        assert not [entry for entry in one.noise if entry[0] == "error"]


def test_the_camera_is_pulled_out_and_back(browser):
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        # what the browser does when a camera is unplugged
        one.get("""window.seen.tracks.forEach((t) => {
            t.stop(); t.dispatchEvent(new Event('ended')) })""")
        one.says("The camera was disconnected")
        assert one.get("document.body.dataset.phase") == "running"
        one.page.get_by_role("button", name="Open the camera again").click()
        one.more()
        assert one.get("document.getElementById('note').hidden")
        assert len(house.gates["r0red"].starts) == 1


@pytest.mark.parametrize("back", [True, False])
def test_the_camera_is_pulled_out_while_in_the_line(browser, back):
    """Plugged in again it is opened; if it is not, the turn ends in words, and may begin anew."""
    with House(("red",)) as house, visiting(browser, house) as one, \
            visiting(browser, house) as two:  # fmt: skip
        two.run()
        one.start()
        one.phase("waiting")
        one.get("""(() => { window.seen.fails = 'NotFoundError';
            window.seen.tracks.forEach((t) => { t.stop(); t.dispatchEvent(new Event('ended')) });
            })()""")
        one.says("The camera was disconnected")
        house.ahead = 2
        one.says("3 of 3 in line", "line")
        one.says("The camera was disconnected")
        house.ahead = 0
        if back:
            one.get("""(() => { window.seen.fails = null;
                navigator.mediaDevices.dispatchEvent(new Event('devicechange')) })()""")
            one.wait("window.seen.lit() === 1 && document.getElementById('note').hidden")
        two.page.click("#stop")
        if back:
            one.phase("running", 5)
            one.more()
            return
        one.phase("over")
        one.says("No camera was found", "lead")
        assert one.get("document.getElementById('note').hidden")
        one.get("(window.seen.fails = null)")
        one.run()


def test_a_workflow_without_a_camera_asks_for_none(browser):
    with House(("green",), camera=False) as house, visiting(browser, house) as one:
        assert "not used" in one.text("privacy")
        one.run()
        one.more()
        assert one.get("window.seen.asked") == 0
