"""A visitor's page in Chromium, as tests of it and of the house hold it."""

import asyncio
import contextlib

from clock import Limit

# what a page keeps of itself for the tests
WATCH = """
window.seen = { asked: 0, tracks: [], dark: 0, lines: [] };
if (navigator.mediaDevices) {
  const get = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = async (wish) => {
    window.seen.asked += 1;
    if (window.seen.fails) throw new DOMException('no', window.seen.fails);
    const stream = await get(wish);
    window.seen.tracks.push(...stream.getTracks());
    return stream;
  };
  const clone = MediaStreamTrack.prototype.clone;
  MediaStreamTrack.prototype.clone = function () {
    const made = clone.call(this);
    window.seen.tracks.push(made);
    return made;
  };
}
window.seen.lit = () => window.seen.tracks.filter((t) => t.readyState === 'live').length;
window.seen.canvas = () => document.querySelector('.livediffusion-output canvas');
window.seen.frames = () => Number(window.seen.canvas()?.dataset.frames ?? 0);
window.seen.colour = (x = 0.5, y = 0.1) => {
  const c = window.seen.canvas();
  const at = [Math.floor(x * c.width), Math.floor(y * c.height), 1, 1];
  const [r, g, b] = c.getContext('2d').getImageData(...at).data;
  return r > g && r > b ? 'red' : g > b ? 'green' : 'blue';
};
addEventListener('DOMContentLoaded', () => new MutationObserver(() => {
  window.seen.lines.push(document.body.dataset.phase);
}).observe(document.body, { attributes: true, attributeFilter: ['data-phase'] }));
"""


def context(browser, **settings):
    usual = {"viewport": {"width": 760, "height": 480}, "permissions": ["camera"],
             "locale": "en-GB"}  # fmt: skip
    made = browser.new_context(**{**usual, **settings})
    made.add_init_script(WATCH)
    return made


class Visitor:
    """A page, and what it said to the console."""

    def __init__(self, page, house):
        self.page, self.house, self.noise = page, house, []
        page.on("console", lambda m: self.noise.append((m.type, m.text)))
        page.on("pageerror", lambda e: self.noise.append(("error", str(e))))

    def open(self):
        self.page.goto(self.house.url)
        self.wait("document.body.dataset.phase !== 'loading'")

    def get(self, expression, *args):
        return self.page.evaluate(f"(a) => {expression}", *args)

    def wait(self, condition, seconds=10):
        limit = Limit(seconds)
        while not self.get(condition):
            if limit.over:
                there = self.get("[document.body.dataset.phase, document.body.innerText]")
                raise AssertionError(f"not so: {condition}; there is {there}; {self.noise}")
            self.page.wait_for_timeout(20)

    def phase(self, name, seconds=10):
        self.wait(f"document.body.dataset.phase === '{name}'", seconds)

    def text(self, id):
        return self.get("document.getElementById(a).textContent", id)

    def says(self, text, id="note", seconds=10):
        there = f"document.getElementById('{id}')"
        self.wait(f"!{there}.hidden && {there}.textContent.includes({text!r})", seconds)

    def start(self):
        self.page.click("#start")

    def run(self):
        self.start()
        self.phase("running")

    def more(self, count=3):
        """More pictures come than there are."""
        self.wait(f"window.seen.frames() >= {self.get('window.seen.frames()') + count}")

    def field(self, label):
        return self.page.get_by_label(label, exact=True)


@contextlib.contextmanager
def visiting(browser, house, opened=True, **settings):
    """A page of its own; each house has an origin of its own, so nothing is kept from another's."""
    around = context(browser, **settings) if settings else browser.usual
    page = around.new_page()
    try:
        visitor = Visitor(page, house)
        if opened:
            visitor.open()
        yield visitor
    finally:
        page.close()
        if settings:
            around.close()


def until(house, condition, seconds=8):
    """Wait for something that the house knows."""
    limit = Limit(seconds)
    while not condition():
        assert not limit.over, [vars(g) for g in house.gates.values()]
        house.call(_moment())


async def _moment():
    await asyncio.sleep(0.02)


def runs(house, replica):
    return list(house.gates[replica].runs.values())
