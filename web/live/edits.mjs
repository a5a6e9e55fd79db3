// Notices that the graph was edited, however that was done: in the canvas, in Nodes 2.0, by a script.

const SOON = 60 // ms after the last sign of an edit
const DURING = 100 // ms between two looks while signs go on coming
const SLOW = 1000 // ms between two looks without a sign
const SIGNS = ['input', 'change', 'pointerup', 'keyup', 'wheel', 'drop', 'paste']

export class Edits {
  #known
  #saved
  #soon = 0
  #during = 0
  #slow = 0
  #run = null // what is its own, from begin() to end()
  #looking = null // the run whose look goes on; one before it may have been held up for good
  #again = false

  /**
   * @param api ComfyUI's api
   * @param reader see reader.mjs
   * @param changed called with each graph that differs from the one before; where it resolves with
   *   false the graph has not arrived, and it is called again
   * @param ready whether there is a graph to look at, and not a half loaded one
   */
  constructor(api, reader, changed, ready) {
    this.api = api
    this.reader = reader
    this.changed = changed
    this.ready = ready
  }

  begin(output) {
    this.#run = {}
    this.#known = JSON.stringify(output)
    this.#saved = this.reader.saved()
    for (const sign of SIGNS) document.addEventListener(sign, this.#sign, true)
    document.addEventListener('pointermove', this.#move, true)
    this.api.addEventListener('graphChanged', this.#sign)
    this.#slow = setInterval(this.#glance, SLOW)
  }

  end() {
    for (const sign of SIGNS) document.removeEventListener(sign, this.#sign, true)
    document.removeEventListener('pointermove', this.#move, true)
    this.api.removeEventListener('graphChanged', this.#sign)
    clearInterval(this.#slow)
    clearTimeout(this.#soon)
    clearTimeout(this.#during)
    this.#during = 0
    this.#run = null
  }

  // whoever drags, or turns a wheel, gives signs without a pause, and wants to see what it does
  #sign = () => {
    clearTimeout(this.#soon)
    this.#soon = setTimeout(this.look, SOON)
    this.#during ||= setTimeout(() => {
      this.#during = 0
      this.#glance()
    }, DURING)
  }

  // a slider on the canvas that is dragged gives no other sign before it is let go
  #move = ({ buttons }) => buttons && this.#sign()

  // perhaps nobody did anything: other packs are asked for their part only if the nodes are not as
  // they were
  #glance = () => {
    if (this.ready() && this.reader.saved() !== this.#saved) return this.look()
  }

  look = async () => {
    const run = this.#run
    if (!run || !this.ready()) return
    if (this.#looking === run) {
      this.#again = true
      return
    }
    this.#looking = run
    try {
      do {
        this.#again = false
        this.#saved = this.reader.saved()
        const graph = await this.reader.read()
        const text = JSON.stringify(graph?.output)
        if (this.#run !== run) return
        if (text === this.#known || !this.ready()) continue
        this.#known = text
        const arrived = await this.changed(graph)
        if (this.#run !== run) return
        // the next look finds it, if not the next sign
        if (arrived === false && this.#known === text) this.#known = this.#saved = null
      } while (this.#again)
    } finally {
      if (this.#looking === run) this.#looking = null
    }
  }
}
