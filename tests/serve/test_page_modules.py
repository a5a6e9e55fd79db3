"""Modules that the visitor's page is made of, or that the house gives out, each by itself."""

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


def test_languages_times_and_ways(browser):
    with House() as house, visiting(browser, house) as one:
        told = one.get("import('/page/text.mjs').then((m) => a.map((w) => m.chosen(w)))",
                       [["xx", "es-MX"], ["zh-Hant-MO"], ["zh-CN"], ["pt-PT"], ["ja-JP", "en"],
                        ["de"], [], ["en-US", "fr"]])  # fmt: skip
        assert told == ["es", "zh-TW", "zh", "pt-BR", "ja", "en", "en", "en"]
        said = one.get("import('/page/text.mjs').then((m) => a.map((s) => m.about(s, 'en')))",
                       [0, 3, 38, 54, 56, 61, 3600])  # fmt: skip
        assert said == ["5 seconds", "5 seconds", "40 seconds", "55 seconds", "1 minute",
                        "2 minutes", "60 minutes"]  # fmt: skip
        for direct, page, ways in (
            ("http://h:8301", "https://h/", ["https://h/relay/x"]),
            ("http://h:8301", "http://h/", ["http://h:8301", "http://h/relay/x"]),
            ("http://127.0.0.1:8301", "https://h/", ["http://127.0.0.1:8301", "https://h/relay/x"]),
            ("https://h:8301/", "https://h/art/", ["https://h:8301", "https://h/art/relay/x"]),
            (None, "http://h/", ["http://h/relay/x"]),
        ):
            found = one.get(
                "import('/page/gate.mjs').then((m) => m.ways(a[0], { get: () => false }, a[1]))",
                [{"direct": direct, "relay": "/relay/x"}, page],
            )
            assert found == ways


def test_a_place_that_was_left_and_does_not_answer_holds_up_no_change_of_the_next(browser):
    with House() as house, visiting(browser, house) as one:
        told = one.get("""Promise.all(['values', 'gate'].map((m) => import(`/page/${m}.mjs`))).then(
          async ([{ Values }, { Gate }]) => {
            const told = [], kept = { get() {}, set() {} }, { fetch } = window;
            const pause = () => new Promise((done) => setTimeout(done, 200));
            const place = (name, answer) => ({
              start: async ({ values }) => void told.push([name, 'start', values]),
              update: ({ values }) => (told.push([name, 'update', values]), answer),
            });
            let late;
            const old = place('old', new Promise((done) => (late = done)));
            const next = place('next', Promise.resolve());
            const values = new Values(kept, () => false);
            values.addEventListener('taken', ({ detail }) => told.push(['taken', detail.name]));
            await values.begin(old);
            values.set('a', 1, 0);
            await pause();
            values.end(old);
            await values.begin(next);
            values.set('a', 2, 0);
            await pause();
            late();
            await pause();
            values.set('a', 3, 0);
            await pause();
            // what hangs is given up
            window.fetch = async (url, { signal }) => told.push(signal instanceof AbortSignal);
            await new Gate('http://gate', 'ticket', 'client').fetchApi('/x', { method: 'POST' });
            window.fetch = fetch;
            return told;
          })""")
        assert told == [
            ["old", "start", {}], ["old", "update", {"a": 1}],
            ["next", "start", {"a": 1}], ["next", "update", {"a": 2}], ["taken", "a"],
            ["next", "update", {"a": 3}], ["taken", "a"], True,
        ]  # fmt: skip


def test_a_house_that_says_nothing_any_more_is_asked_anew(browser):
    """A connection may be gone without a word; a page that slept reads what came meanwhile."""
    with House() as house, visiting(browser, house, opened=False) as one:
        one.page.goto(f"{house.url}/i18n")
        told = one.get("""import('/page/house.mjs').then(async ({ House }) => {
          const lines = [], told = [];
          let at = 1e12;
          Date.now = () => at;
          window.WebSocket = class {
            static OPEN = 1;
            readyState = 1;
            constructor() { lines.push(this) }
            send() {}
            close() { told.push('dropped') }
            hear(type) { this.onmessage({ data: JSON.stringify({ type }) }) }
          };
          const made = new House('ws://house/visit', { get() {}, set() {} });
          for (const type of ['welcome', 'ticket', 'down', 'up', 'over'])
            made.addEventListener(type, () => told.push(type));
          const look = (seconds) => {
            at += 1000 * seconds;
            document.dispatchEvent(new Event('visibilitychange'));
          };
          made.open();
          lines[0].onopen();
          lines[0].hear('welcome');
          for (const seconds of [31, 31]) look(seconds);
          lines[0].hear('ticket');
          look(3600);
          lines[0].hear('ticket');
          look(5);
          look(61);
          told.push('silent');
          look(5);
          await new Promise((done) => setTimeout(done, 400));
          // late, or of the house's, which takes this page's next socket for another page's
          lines[0].hear('over');
          lines[0].onclose({ code: 4409 });
          lines[1].onopen();
          lines[1].hear('welcome');
          return [told, lines.length];
        })""")
        assert told == [["welcome", "ticket", "ticket", "silent", "dropped", "down", "up",
                         "welcome"], 2]  # fmt: skip


def test_a_live_camera_without_a_code_for_its_phone_has_nothing_to_copy(browser):
    """The house serves the module of ComfyUI's page; a run of too many phones gives no code."""
    with House() as house, visiting(browser, house) as one:
        told = one.get("""Promise.all(['panels', 'style'].map((m) => import(`/web/live/${m}.mjs`)))
            .then(([{ panels }, { element }]) => {
              const captures = Object.assign(new EventTarget(), { devices: async () => [] });
              const codes = [], tools = { say: (key) => key, element };
              const picker = { tools, captures: { browser: captures, screen: captures },
                               code: (phone) => codes.push(phone), copy: (url) => codes.push(url) };
              const { phone: panel } = panels(picker);
              for (const phone of [null, { url: 'there' }]) {
                panel.attach({ phone });
                codes.push(panel.copyButton.disabled);
                panel.copyButton.click();
              }
              return codes.map((one) => one?.url ?? one);
            })""")
        assert told == [None, True, "there", False, "there"]


def test_a_picture_that_nobody_will_see_is_answered(browser):
    """Its node goes before the next refresh, as at an undo; unanswered, no more would be sent."""
    with House() as house, visiting(browser, house) as one:
        told = one.get("""Promise.all(['picture', 'compare', 'screen', 'style'].map(
            (m) => import(`/web/live/${m}.mjs`)
        )).then(([{ Picture }, { Compare }, { Screen }, { element }]) => {
          const answered = [], closed = [];
          const session = { compare() {}, shown: ({ seq }, again) => answered.push([seq, again]) };
          const tools = { say: (key) => key, element, Compare, Screen };
          const made = new Picture({ properties: {} }, tools);
          made.attach(session, 0);
          for (const seq of [4, 5]) {
            made.take({ view: 0, seq, bitmap: { close: () => closed.push(seq) }, input: null });
          }
          made.detach();
          return [answered, closed];
        })""")
        assert told == [[[4, True], [5, True]], [4, 5]]


def test_pictures_go_on_after_one_that_broke_and_when_a_node_comes_back(browser):
    """A window that is just closing may refuse to be drawn on; a sweep may miss a node for once."""
    with House() as house, visiting(browser, house) as one:
        told = one.get("""Promise.all(['picture', 'compare', 'screen', 'style'].map(
            (m) => import(`/web/live/${m}.mjs`)
        )).then(async ([{ Picture }, { Compare }, { Screen }, { element }]) => {
          const answered = [];
          const session = { compare() {}, shown: ({ seq }, again) => answered.push([seq, again]) };
          const tools = { say: (key) => key, element, Compare, Screen };
          let broken = true;
          const others = () => [{ paint() { if (broken) throw new Error('gone') } }];
          const made = new Picture({ properties: {} }, tools, { others });
          const refresh = () => new Promise((done) => setTimeout(done, 200));
          const take = (seq) => made.take(
            { view: 0, seq, bitmap: document.createElement('canvas'), input: null });
          HTMLCanvasElement.prototype.close = () => {};
          made.attach(session, 0);
          const error = new Promise((done) => addEventListener('error', (e) => {
            e.preventDefault(); done(e.message) }, { once: true }));
          take(1);
          await error;
          broken = false;
          take(2);
          made.remove();
          made.attach(session, 0);
          take(3);
          await refresh();
          return answered;
        })""")
        assert told == [[1, False], [2, True], [3, False]]


def test_pictures_go_on_where_the_screen_gives_no_refresh(browser):
    """As in a window that another one covers, in browsers that do not call such a page hidden."""
    with House() as house, visiting(browser, house) as one:
        told = one.get("""Promise.all(['picture', 'compare', 'screen', 'style'].map(
            (m) => import(`/web/live/${m}.mjs`)
        )).then(async ([{ Picture }, { Compare }, { Screen }, { element }]) => {
          const answered = [];
          const session = { compare() {}, shown: ({ seq }) => answered.push(seq) };
          const tools = { say: (key) => key, element, Compare, Screen };
          const made = new Picture({ properties: {} }, tools);
          const ask = window.requestAnimationFrame;
          window.requestAnimationFrame = () => 1;
          made.attach(session, 0);
          for (const seq of [1, 2, 3]) {
            made.take({ view: 0, seq, bitmap: await createImageBitmap(new ImageData(8, 8)) });
            if (seq > 1) await new Promise((done) => setTimeout(done, 600));
          }
          window.requestAnimationFrame = ask;
          return [answered, made.canvas.dataset.frames, made.canvas.dataset.seq];
        })""")
        assert told == [[1, 2, 3], "2", "3"]


KEPT = """import('/web/live/session.mjs').then(async ({ Session }) => {
  const urls = [], states = [], asked = [];
  class Line extends EventTarget {
    postMessage({ type, url }) {
      if (type !== 'open') return;
      urls.push(new URL(url).searchParams.get('role'));
      if (a) setTimeout(() => this.onmessage?.({ data: { type: 'closed', code: a } }));
    }
    terminate() {}
  }
  const capture = Object.assign(new EventTarget(), { leave() {} }), worker = window.Worker;
  window.Worker = Line;
  const begun = { session: 's', token: 't', run: 'r', cameras: [], views: [] };
  const api = { clientId: 'c', apiURL: (path) => path, fetchApi: async (path) => {
    asked.push(path);
    return { ok: true, json: async () => ({ ...begun }) };
  } };
  const session = new Session(api, capture, 'worker', (key) => key);
  window.Worker = worker;
  session.addEventListener('state', ({ detail }) => states.push(detail.state));
  await session.start({}, {}, { run: 'r' });
  await new Promise((done) => setTimeout(done, a === 1006 ? 1200 : 200));
  const told = [new Set(urls).size, urls[0], asked.length, states, session.state];
  session.close();
  return told;
})"""


def test_a_page_on_a_kept_run_takes_no_other_ones_place_and_comes_back_after_pauses(browser):
    """Where a proxy lets no WebSocket through, each answer is followed by the next loss."""
    with House() as house, visiting(browser, house) as one:
        assert one.get(KEPT, 0) == [1, "watch", 1, [], "starting"]
        kinds, role, asked, states, state = one.get(KEPT, 1006)
        assert (kinds, role) == (1, "watch") and 2 <= asked <= 3
        assert "again" in states and state != "over"
        # another page has its place: it does not fight for it
        assert one.get(KEPT, 4409) == [1, "watch", 1, ["failed"], "over"]


def test_what_was_said_before_the_server_heard_of_a_stop_does_not_undo_it(browser):
    with House() as house, visiting(browser, house) as one:
        told = one.get("""import('/web/live/session.mjs').then(async ({ Session }) => {
          const states = [], lines = [];
          class Line extends EventTarget {
            constructor() { super(); lines.push(this) }
            postMessage() {}
            terminate() {}
          }
          const capture = Object.assign(new EventTarget(), { leave() {} }), worker = window.Worker;
          window.Worker = Line;
          const begun = { session: 's', token: 't', cameras: [], views: [] };
          const fetchApi = async () => ({ ok: true, json: async () => ({ ...begun }) });
          const api = { clientId: 'c', apiURL: (path) => path, fetchApi };
          const session = new Session(api, capture, 'worker', (key) => key);
          window.Worker = worker;
          session.addEventListener('state', ({ detail }) => states.push(detail.state));
          const hear = (data) => lines[0].onmessage?.({ data });
          const say = (state) => hear({ type: 'message', message: { type: 'state', state } });
          await session.start({}, {});
          say('live');
          const stopped = session.stop();
          say('live');
          await stopped;
          say('ended');
          hear({ type: 'closed', code: 4410 });
          return [states, session.state];
        })""")
        assert told == [["live", "stopping", "ended"], "over"]


@pytest.mark.parametrize("run", [None, "r"])
def test_a_worker_that_does_not_load_is_said_and_ends_what_began(browser, run):
    with House() as house, visiting(browser, house) as one:
        told = one.get("""import('/web/live/session.mjs').then(async ({ Session }) => {
          const asked = [], states = [];
          const capture = Object.assign(new EventTarget(), { leave() {} });
          const begun = { session: 's', token: 't', run: a, cameras: [], views: [] };
          const api = { clientId: 'c', apiURL: (path) => path, fetchApi: async (path) => {
            asked.push(path);
            return { ok: true, json: async () => ({ ...begun }) };
          } };
          const { fetch } = window;
          window.fetch = async (path) => void asked.push(path);
          const session = new Session(api, capture, '/web/live/none.mjs', (key) => key);
          session.addEventListener('state', ({ detail }) => states.push(detail));
          const over = new Promise((done) => session.addEventListener('over', done));
          await session.start({}, {}, a ? { run: a } : {});
          await over;
          await new Promise((done) => setTimeout(done, 800));
          window.fetch = fetch;
          return [states, asked.map((path) => path.split('/').at(-1))];
        })""", run)
        assert told == [
            [{"state": "failed", "reason": "notLoaded", "final": True}],
            ["attach"] if run else ["start", "stop"],
        ]


# a run whose server may be silent, where time goes a hundred times as fast
# a: {run, answer to its end, state that is told in its place}
STOPPED = """import('/web/live/session.mjs').then(async ({ Session }) => {
  const states = [], problems = [], lines = [], { setTimeout: later } = window;
  const { timeout } = AbortSignal, worker = window.Worker;
  window.Worker = class extends EventTarget {
    constructor() { super(); lines.push(this) }
    postMessage() {}
    terminate() {}
  };
  window.setTimeout = (work, ms) => later(work, ms / 100);
  AbortSignal.timeout = (ms) => timeout.call(AbortSignal, ms / 100);
  const capture = Object.assign(new EventTarget(), { leave() {} });
  const begun = { session: 's', token: 't', run: a.run, cameras: [], views: [] };
  const fetchApi = (path, { signal }) => {
    if (!/(stop|end)$/.test(path)) return { ok: true, json: async () => ({ ...begun }) };
    const { answer } = a;
    return answer ?? new Promise((done, fail) => {
      signal?.addEventListener('abort', () => fail(signal.reason));
    });
  };
  const api = { clientId: 'c', apiURL: (path) => path, fetchApi: async (...of) => {
    const answer = await fetchApi(...of);
    return { json: async () => answer.told, ...answer };
  } };
  const session = new Session(api, capture, 'worker', (key) => key);
  session.addEventListener('state', ({ detail }) => states.push(detail.state));
  session.addEventListener('problem', ({ detail }) => problems.push(detail.reason));
  const over = new Promise((done) => session.addEventListener('over', () => done('over')));
  await session.start({}, {}, a.run ? { run: a.run } : {});
  const hear = (state) => lines[0].onmessage(
    { data: { type: 'message', message: { type: 'state', state } } });
  hear('live');
  if (a.state) hear(a.state);
  else session.stop();
  const told = await Promise.race([over, new Promise((done) => later(() => done('there'), 300))]);
  session.close();
  Object.assign(window, { Worker: worker, setTimeout: later });
  AbortSignal.timeout = timeout;
  return [told, states, problems];
})"""


@pytest.mark.parametrize(("how", "told", "problems"), [
    ({"answer": {"ok": True, "told": {"state": "ended"}}}, "over", []),
    ({"answer": {"ok": False, "status": 410, "told": {}}}, "over", []),
    ({}, "over", []),
    ({"run": "r"}, "over", ["broke"]),
    ({"run": "r", "answer": {"ok": False, "status": 410, "told": {}}}, "over", []),
    ({"state": "ended"}, "over", []),
    ({"state": "failed"}, "over", []),
    # these go on: a frame that takes its time, and a kept run that begins anew
    ({"answer": {"ok": True, "told": {"state": "stopping"}}}, "there", []),
    ({"run": "r", "state": "failed"}, "there", []),
])  # fmt: skip
def test_a_run_that_is_over_is_left_though_its_socket_says_nothing(browser, how, told, problems):
    """As where the connection is dead, and neither side hears of it."""
    with House() as house, visiting(browser, house) as one:
        last, states, said = one.get(STOPPED, how)
        assert (last, said) == (told, problems)
        assert states == ["live", how.get("state", "stopping")]
