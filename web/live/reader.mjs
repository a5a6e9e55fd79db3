// The graph as a Run would send it, with what other packs do to it on the way.
//
// Packs change the graph in two places: around app.graphToPrompt, and around app.queuePrompt (some
// change it in the one only while the other is running). So a graph is read by calling the page's
// app.queuePrompt, whoever has wrapped it, down to a function of ours that lies innermost. There a
// Run goes on to ComfyUI; a read asks for the graph and turns back. Nothing is queued and no widget
// is told that it was: a seed that changes after each Run keeps its value.

const NONE = 0 // prompts to be queued
const MARK = -0 // an order in the queue that is 0 to everybody who does not look twice

const PLACE = new Set(['pos', 'size', 'order', 'bounding'])

export class Reader {
  #app
  #queuePrompt
  #say
  #wish = null
  #reading = null
  #runs = new Set()

  /**
   * @param app ComfyUI's app, whose queuePrompt leads to queue() below
   * @param queuePrompt what app.queuePrompt was before
   * @param say see words.mjs
   */
  constructor(app, queuePrompt, say) {
    this.#app = app
    this.#say = say
    this.#queuePrompt = queuePrompt
  }

  /** Whether the graph is being read, and not run. */
  get busy() {
    return this.#reading !== null
  }

  get #root() {
    return this.#app.rootGraph ?? this.#app.graph
  }

  // a Run names the graph, too, and there are packs that pass on nothing else
  #graph = () => this.#app.graphToPrompt(this.#root)

  /** The nodes as they would be saved, as text; without where they are, asking nobody. */
  saved() {
    const { nodes, links, definitions } = this.#root.serialize()
    return JSON.stringify([nodes, links, definitions], (key, value) =>
      PLACE.has(key) ? undefined : value
    )
  }

  /** {output, workflow} as a Run would send them now. */
  async read() {
    // packs that change the graph and change it back do not expect to be asked twice at a time
    while (this.#reading) await Promise.allSettled([this.#reading])
    this.#reading = this.#read()
    try {
      return await this.#reading
    } finally {
      this.#reading = null
    }
  }

  async #read() {
    const wish = (this.#wish = {})
    try {
      await this.#app.queuePrompt(MARK, NONE)
    } catch (error) {
      if (!wish.graph) throw error
    } finally {
      this.#wish = null
    }
    // a pack that lets nothing through is left out
    const graph = await (wish.graph ?? this.#graph())
    if (!graph?.output) throw new Error(this.#say('noGraph'))
    return graph
  }

  /**
   * Innermost of app.queuePrompt. Whoever comes later waits for who is here: a pack may let in one
   * at a time, so that nobody here may wait for one who is not.
   */
  async queue(number, count, ...rest) {
    const wish = this.#wish
    if (wish && (count === NONE || Object.is(number, MARK))) {
      while (this.#runs.size) await Promise.allSettled(this.#runs)
      await (wish.graph ??= this.#graph())
      return false
    }
    await wish?.graph?.catch(() => {})
    const run = this.#queuePrompt.call(this.#app, number, count, ...rest)
    this.#runs.add(run)
    try {
      return await run
    } finally {
      this.#runs.delete(run)
    }
  }
}
