"""The visitor's page in a real Chromium, with a double of the house behind it."""

import io
import pathlib
import sys

import pytest
from chromium import launch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fakes import House
from pages import Visitor, context, runs, until, visiting

pytestmark = [pytest.mark.alone, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser(playwright, tmp_path_factory):
    """Its camera sees a grey wall with a white ball."""
    path = tmp_path_factory.mktemp("camera") / "ball.mjpeg"
    film = b""
    for number in range(10):
        picture = Image.new("RGB", (640, 480), (128, 128, 128))
        picture.paste((255, 255, 255), (270 + 10 * number, 200, 370 + 10 * number, 300))
        file = io.BytesIO()
        picture.save(file, "JPEG")
        film += file.getvalue()
    path.write_bytes(film)
    running, _ = launch(playwright, path)
    running.usual = context(running)
    yield running
    running.close()


# -- from the first look to the last picture ----------------------------------------------------


def test_a_stranger_starts_waits_runs_and_stops(browser):
    with House(("red",), limit_s=90) as house, visiting(browser, house) as one:
        assert one.text("title") == house.title
        assert "not kept" in one.text("privacy") and one.text("lead") == "You have 2 minutes."
        # nothing is asked, opened or sent before somebody wants it
        assert one.get("window.seen.asked") == 0
        with visiting(browser, house) as two:
            two.run()
            one.start()
            one.phase("waiting")
            one.says("About 20 seconds", "lead")
            assert one.text("line") == "" and one.get("window.seen.lit()") == 1
            house.ahead = 2
            one.says("3 of 3 in line", "line")
            one.says("3 of 3 in line. About 1 minute", "status")
            assert not runs(house, "r0red")[1:] and one.get("window.seen.frames()") == 0
            house.ahead = 0
            two.page.click("#stop")
            two.phase("over")
            assert two.get("window.seen.lit()") == 0
        one.phase("running", 5)
        one.more()
        assert one.get("window.seen.colour()") == "red" and one.get("window.seen.asked") == 1
        one.wait("/fps, \\d+ ms/.test(document.getElementById('figures').textContent)")
        assert one.text("left") in ("1:30", "1:29", "1:28", "1:27")
        one.page.click("#stop")
        one.phase("over")
        one.says("You have stopped", "lead")
        until(house, lambda: not runs(house, "r0red"))
        assert one.get("window.seen.lit()") == 0
        assert one.get("document.activeElement.id") == "start"
        one.run()  # again, with the same place in the house
        bad = [entry for entry in one.noise if entry[0] in ("error", "warning")]
        assert [entry for entry in bad if "410" not in entry[1]] == []  # stopped twice
        ours = {"/", "/visit", "/i18n"}
        assert all(p in ours or p.startswith(("/page/", "/web/live/")) for p in house.requests)


def test_the_time_is_up_the_operator_ends_it_and_the_house_is_full(browser):
    with House(("red",), limit_s=2) as house, visiting(browser, house) as one:
        one.run()
        one.says("Your time is up", "lead")
        assert one.get("window.seen.lit()") == 0 and one.get("window.seen.frames()") > 0
        house.limit_s = None
        one.run()
        assert one.text("left") == ""
        (visitor,) = house.visitors.values()
        house.call(house.over(visitor, "operator"))
        one.says("operator has ended", "lead")
        one.run()
        house.call(house.over(visitor, "closed"))
        one.says("This closes now", "lead")
        house.full = True
        one.start()
        one.says("too many people", "lead")
        house.full, house.warming = False, True
        one.start()
        one.says("getting ready", "lead")
        one.page.click("#leave")
        one.phase("over")
        until(house, lambda: not visitor.wants)


def test_it_speaks_the_browsers_language(browser):
    with House() as house:
        for language, word, option, camera in (
            ("de-DE", "Start", "crop", "Camera"), ("fr-CA", "Commencer", "rogner", "Cam\u00e9ra"),
            ("zh-HK", "\u958b\u59cb", None, "\u651d\u5f71\u6a5f"),
        ):  # fmt: skip
            with visiting(browser, house, locale=language) as one:
                assert one.text("start") == word
                said = one.get("[...document.querySelectorAll('option')].map((o) => o.text)")
                assert option is None or option in said
                # what the page itself has put there is not the workflow's author's word
                label = "document.querySelector('.field.camera label').textContent"
                assert one.get(label) == camera


def test_what_is_set(browser):
    """Sent a moment after the last touch; refused one by one; the picture goes on."""
    with House(("red",)) as house, visiting(browser, house) as one:
        gate = house.gates["r0red"]
        one.run()
        (run,) = gate.runs.values()
        one.field("Prompt").fill("")
        one.field("Prompt").press_sequentially("neon night", delay=20)
        until(house, lambda: run.values.get("3.text") == "neon night")
        assert len(gate.updates) == 1, "one edit for what was typed in one go"
        one.get("""(() => { const s = document.querySelector('[type=range]');
            for (const v of [0.1, 0.2, 0.3]) { s.value = v; s.dispatchEvent(new Event('input')); }
            })()""")
        one.page.get_by_role("switch", name="Mirror").click()
        one.page.get_by_label("Fit").select_option(label="stretch")
        until(house, lambda: run.values == {"3.text": "neon night", "5.strength": 0.3,
                                            "1.mirror": False, "1.fit": "stretch"})  # fmt: skip
        # one that cannot be: its sentence is at its control, and no other is held up by it
        before = one.get("window.seen.frames()")
        one.field("Prompt").fill("forbidden")
        one.page.get_by_role("button", name="Another").click()
        refusal = "document.querySelector('.field.text .refusal').textContent"
        one.wait(f"{refusal} === 'Prompt: this is not a prompt for here; say something else.'")
        assert one.get("document.querySelector('textarea').ariaInvalid") == "true"
        until(house, lambda: "6.seed" in run.values)
        assert run.values["3.text"] == "neon night" and one.get("window.seen.frames()") > before
        one.field("Prompt").fill("calm sea")
        until(house, lambda: run.values["3.text"] == "calm sea")
        one.wait(f"{refusal} === ''")
        # one that was taken and then did not run: what was before goes on, also elsewhere
        house.call(gate.tell({"type": "problem", "kind": "edit", "reason": "x", "node": None}))
        one.wait(f"{refusal}.startsWith('This does not work here')")
        assert one.get("JSON.parse(sessionStorage['livediffusion.visit']).values['3.text']") \
            == "neon night"  # fmt: skip
        one.field("Prompt").fill("calm sea again")
        until(house, lambda: run.values["3.text"] == "calm sea again")
        # what is no number for it never leaves the page
        number = one.page.locator("input[type=number]").first
        number.fill("7")
        number.press("Enter")
        until(house, lambda: run.values["5.strength"] == 1)
        assert number.input_value() == "1"
        assert all(0 <= u.get("5.strength", 0) <= 1 for u in gate.updates)
        one.page.get_by_role("button", name="As it was").click()
        until(house, lambda: run.values["3.text"] == "a watercolour" and run.values["6.seed"] == 7)
        assert one.page.get_by_role("button", name="As it was").count() == 0
        one.more()


def test_compare(browser):
    with House(("red",), views=2) as house, visiting(browser, house) as one:
        one.run()
        (run,) = house.gates["r0red"].runs.values()
        assert one.get("document.querySelectorAll('#pictures canvas[role=img]').length") == 2
        for mode in ("line", "side by side"):
            one.page.click(f"button[data-mode='{mode}']")
            one.wait(f"document.querySelectorAll(\"[data-compare='{mode}']\").length === 2")
            until(house, lambda: run.compared == {0, 1})
        one.page.click("button[data-mode='off']")
        until(house, lambda: not run.compared)


# -- it moves -----------------------------------------------------------------------------------


def test_a_replica_drains_and_the_stream_moves_without_a_gap(browser):
    with House(("red", "blue")) as house, visiting(browser, house) as one:
        house.gates["r1blue"].first_s = 0.7
        one.run()
        one.field("Prompt").fill("neon night")
        until(house, lambda: runs(house, "r0red")[0].values)
        one.get("window.seen.lines.length = 0")
        house.call(house.drain("r0red"))
        one.says("Moving to another machine")
        # the camera is as open as it was, and the old place shows pictures until the new one does
        one.more(2)
        assert one.get("window.seen.colour()") == "red"
        one.wait("window.seen.colour() === 'blue'")
        one.phase("running")
        assert house.gates["r1blue"].starts == [{"3.text": "neon night"}]
        until(house, lambda: not runs(house, "r0red"))
        assert one.get("[window.seen.asked, window.seen.lines]") == [1, ["moving", "running"]]
        assert one.get("document.getElementById('note').hidden")
        one.more()
        assert one.get("window.seen.lit()") == 2  # the camera, and what the worker reads of it


def test_a_replica_dies_and_the_stream_is_back_with_its_settings(browser):
    with House(("red", "green"), direct=False) as house, visiting(browser, house) as one:
        one.run()
        one.field("Prompt").fill("neon night")
        until(house, lambda: runs(house, "r0red")[0].values)
        house.ahead = 1  # nobody has a place for it at first
        house.call(house.gates["r0red"].kill())
        one.says("The machine is gone", seconds=15)
        assert one.get("window.seen.colour()") == "red"
        one.says("2 of 2 in line. About 40 seconds")
        house.ahead = 0
        one.wait("window.seen.colour() === 'green'", 15)
        one.phase("running")
        assert house.gates["r1green"].starts == [{"3.text": "neon night"}]
        assert one.get("[window.seen.asked, window.seen.lit()]") == [1, 2]


def test_a_socket_breaks_and_the_run_goes_on(browser):
    """The worker comes back by itself, by the address that its newest ticket makes."""
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        gate = house.gates["r0red"]
        (run,) = gate.runs.values()
        (visitor,) = house.visitors.values()
        gate.tickets = {f"stream.{visitor.name}.r0red.new"}
        house.call(house.renew(visitor, ".new"))
        one.page.click("button[data-mode='line']")
        until(house, lambda: run.compared == {0})
        one.page.wait_for_timeout(50)
        house.call(gate.cut(run))
        one.more()
        assert one.get("document.body.dataset.phase") == "running"
        assert len(gate.starts) == 1 and run.session in gate.runs
        until(house, lambda: run.compared == {0})


def test_the_ingress_goes_and_comes_back_and_the_stream_goes_on(browser):
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        house.call(house.leave_the_net(True))
        one.says("The server does not answer")
        one.more(5)
        house.call(house.leave_the_net(False))
        one.wait("document.getElementById('note').hidden")
        one.more(3)
        assert len(house.gates["r0red"].starts) == 1 and len(house.visitors) == 1
        # while it waits, too: its place is the same
        one.page.click("#stop")
        house.ahead = 3
        one.start()
        one.says("4 of 4", "line")
        house.call(house.leave_the_net(True))
        one.says("The server does not answer", "lead")
        house.call(house.leave_the_net(False))
        one.says("4 of 4", "line")
        assert len(house.visitors) == 1


def test_pictures_go_on_when_the_house_says_anew_what_there_is(browser):
    """One that has just come back knows nothing at first; a newer workflow may have other views."""
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        (run,), (visitor,) = runs(house, "r0red"), house.visitors.values()
        known, inputs = house.views, house.inputs
        house.views, house.inputs = [], []
        house.call(house.welcome(visitor))
        house.views, house.inputs = known, inputs
        one.more()
        assert one.field("Prompt").count() == 1
        house.call(house.welcome(visitor))
        one.more()
        house.views = [{**known[0], "title": "Another name"}]
        house.call(house.welcome(visitor))
        one.wait("window.seen.canvas().ariaLabel === 'Another name'")
        one.more()
        # none is of a node that this page shows: answered all the same, or no more would come
        house.views = [{"node": "77", "title": "Another"}]
        house.call(house.welcome(visitor))
        one.wait("window.seen.canvas().ariaLabel === 'Another'")
        answered = run.pictures
        until(house, lambda: run.pictures >= answered + 3)
        house.views = known
        house.call(house.welcome(visitor))
        one.more()
        assert len(house.gates["r0red"].starts) == 1


def test_a_reload_keeps_place_and_settings(browser):
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        one.field("Prompt").fill("neon night")
        until(house, lambda: runs(house, "r0red")[0].values)
        one.page.click("button[data-mode='line']")
        one.page.reload()
        one.phase("running")
        one.more()
        assert len(house.visitors) == 1
        assert house.gates["r0red"].starts[-1] == {"3.text": "neon night"}
        assert one.field("Prompt").input_value() == "neon night"
        assert one.get("document.querySelectorAll(\"[data-compare='line']\").length") == 1


def test_a_gate_that_does_not_answer_is_reached_through_the_house(browser):
    with House(("red",)) as house, visiting(browser, house) as one:
        gate = house.gates["r0red"]
        gate.answers = False
        one.run()
        assert gate.came == ["relay"]
        one.page.click("#stop")
        one.phase("over")
        # remembered: it is not tried again
        one.get("performance.clearResourceTimings()")
        one.run()
        assert gate.came == ["relay"] * 2
        names = one.get("performance.getEntriesByType('resource').map((e) => e.name)")
        assert not [name for name in names if str(gate.port) in name]


def test_another_window_takes_the_place(browser):
    """The newer one has it; the older says so, and takes it back only when it is asked to."""
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        kept = one.get("({ ...sessionStorage })")
        other = Visitor(one.page.context.new_page(), house)
        other.page.add_init_script(f"Object.assign(sessionStorage, {kept!r})")
        other.open()
        other.phase("running")
        one.phase("over")
        one.says("another window", "lead")
        other.more(5)
        assert len(house.gates["r0red"].starts) == 2
        one.run()
        other.phase("over")
        one.more()


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_run_that_fails_says_why_and_can_be_tried_again(browser):
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        (run,) = house.gates["r0red"].runs.values()
        house.call(house.gates["r0red"].fail(run, "The picture could not be made."))
        # what it was is for the operator
        one.says("The workflow could not go on.", "lead")
        until(house, lambda: not next(iter(house.visitors.values())).wants)
        one.run()


@pytest.mark.parametrize("reason, sentence", [
    ("time", "Your time is up"), ("operator", "operator has ended"), ("moved", "It has ended"),
])  # fmt: skip
def test_a_gates_last_word_is_believed_where_the_house_says_nothing(browser, reason, sentence):
    with House(("red",)) as house, visiting(browser, house) as one:
        one.run()
        (run,) = runs(house, "r0red")
        house.call(house.gates["r0red"].end(run, reason))
        one.says(sentence, "lead")
        assert one.get("window.seen.lit()") == 0
        # the house is told, so that whoever starts again now has another turn, not the rest of it
        until(house, lambda: not next(iter(house.visitors.values())).wants)
        one.run()


def test_nothing_of_the_house_is_taken_for_markup(browser):
    bad = "<img src=x onerror=window.bad=1>"
    inputs = [
        {"name": "a", "label": bad, "type": "text", "value": bad, "tooltip": bad, "multiline": True,
         "node_type": bad, "input": bad},
        {"name": "b", "label": bad, "type": "choice", "value": bad, "options": [bad, 2],
         "node_type": "x", "input": "y"},
        {"name": "c", "label": bad, "type": "of another version", "value": 1},
    ]  # fmt: skip
    house = House(("red",), title=bad, inputs=inputs)
    with house, visiting(browser, house) as one:
        one.run()
        assert one.get("[window.bad, document.images.length]") == [None, 0]
        assert one.field(bad).count() == 2
        assert house.title in one.get("document.title")


def test_before_the_house_answers_there_is_nothing_to_press(browser):
    with House(("red",)) as house, visiting(browser, house, opened=False) as one:
        house.refuses = True
        one.page.goto(house.url)
        pressable = "[...document.querySelectorAll('button')].some((b) => b.checkVisibility())"
        assert not one.get(pressable)
        one.says("The server does not answer", "lead")
        assert not one.get(pressable)
        house.refuses = False
        one.phase("idle")
        one.run()


@pytest.mark.parametrize("full, sentence", [(True, "from your network"), (False, "Speak up.")])
def test_a_page_that_is_refused_says_why_and_comes_in_when_it_may(browser, full, sentence):
    with House(("red",)) as house, visiting(browser, house, opened=False) as one:
        house.many = {"reason": "Speak up.", "full": full}
        one.page.goto(house.url)
        one.says(sentence, "lead")
        assert not one.get("document.getElementById('start').checkVisibility()")
        house.many = None
        one.phase("idle")
        one.run()
        if full:  # who is in already keeps the stream, and the place
            house.many = {"reason": "x", "full": True}
            (visitor,) = house.visitors.values()
            visitor.wire.abort()
            one.says(sentence)
            one.more()
            house.many = None
            one.wait("document.getElementById('note').hidden")
            assert len(house.visitors) == 1
        assert not [text for kind, text in one.noise if "TypeError" in text]


# -- sizes --------------------------------------------------------------------------------------

SIZES = [(320, 568), (390, 844), (844, 390), (768, 1024), (1280, 720), (3840, 2160)]
MEASURE = """(() => {
  const box = (e) => e.getBoundingClientRect();
  const shown = (e) => e.checkVisibility() && box(e).width > 0;
  const all = [...document.querySelectorAll('button, select, textarea, input')].filter(shown);
  const scrolls = (e) => e.closest('#controls');
  const canvas = window.seen.canvas();
  return {
    wide: document.documentElement.scrollWidth > innerWidth,
    small: all.filter((e) => box(e).height < 43.5 || box(e).width < 43.5).map((e) => e.outerHTML),
    outside: all.filter((e) => !scrolls(e) && (box(e).left < -0.5 || box(e).top < -0.5
      || box(e).right > innerWidth + 0.5 || box(e).bottom > innerHeight + 0.5)).map((e) => e.id),
    nameless: all.filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))
      .map((e) => e.outerHTML),
    picture: shown(canvas) ? Math.min(box(canvas).width, box(canvas).height) : 0,
    moving: document.getAnimations().length,
  } })()"""


def test_it_fits_every_window(browser):
    with House(("red",), limit_s=90) as house, \
            visiting(browser, house, reduced_motion="reduce") as one:  # fmt: skip

        def fits(least=0.0):
            for width, height in SIZES:
                one.page.set_viewport_size({"width": width, "height": height})
                one.page.wait_for_timeout(30)
                found = one.get(MEASURE)
                picture = found.pop("picture")
                assert found == {"wide": False, "small": [], "outside": [], "nameless": [],
                                 "moving": 0}, (width, height)  # fmt: skip
                assert picture >= least * min(width, height), (width, height, picture)

        fits()
        house.ahead = 2
        one.start()
        one.says("3 of 3", "line")
        fits()
        house.ahead = 0
        one.phase("running")
        fits(0.45)
        one.page.click("#settings")
        fits(0.6)
        one.page.set_viewport_size({"width": 1280, "height": 720})
        one.page.click("#stop")
        one.phase("over")
        fits()


def test_it_goes_by_keys_alone(browser):
    with House(("red",)) as house, visiting(browser, house) as one:
        one.page.keyboard.press("Tab")
        assert one.get("document.activeElement.id") == "start"
        one.page.keyboard.press("Enter")
        one.phase("running")
        met = set()
        for _ in range(24):
            one.page.keyboard.press("Tab")
            met.add(one.get("document.activeElement.id || document.activeElement.dataset.mode"))
        assert {"settings", "full", "stop", "off", "line", "side by side"} <= met
        assert len([name for name in met if name and name.startswith("field")]) == 5
        one.page.focus("#stop")
        one.page.keyboard.press("Space")
        one.phase("over")
        one.page.keyboard.press("Enter")  # the focus is where it goes on
        one.phase("running")
