// Our nodes in the open graph, those in subgraphs too, and what the page has for each of them.

const SCHEDULES = [
  'LiveTimesteps', 'LiveStrength', 'LiveOptimizedSteps', 'LiveLearnedSteps', 'LiveSearchedSteps'
]

const LATE = 5000 // ms after which a graph that is being loaded is looked at, whatever became of it
const SETTLED = [50, 500, 2000] // ms after which a page has exchanged what it shows of its nodes

export class Nodes {
  views = new Map() // node -> View
  pickers = new Map() // node -> Picker
  sends = new Map() // node -> Send
  #plots = new WeakMap() // node -> Plot
  #made = new WeakMap() // node -> its View, Picker or Send, also while it is in no graph
  #windows = new Map() // execution id -> window of a View whose node is being made anew
  #boxes = new Map() // execution id -> what the page showed of a node that is being made anew
  #workflow // their workflow's id
  #late = 0
  #of

  /**
   * @param of app (ComfyUI's), words (see words.mjs), parts {View, Picker, Send, Plot} and the tools
   *   for them, captures (see picker.mjs), still(image) gives the address of a saved picture,
   *   prompted(owner, picker) before an ordinary prompt, gone() after a node was removed
   */
  constructor(of) {
    this.#of = of
  }

  get root() {
    return this.#of.app.rootGraph ?? this.#of.app.graph
  }

  /** The node of an execution id, "4" or "12:4" inside a subgraph. */
  get(id) {
    let graph = this.root
    let found
    for (const part of String(id).split(':')) {
      found = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part)
      graph = found?.subgraph
    }
    return found
  }

  /** A node's id as the server knows it: with the ids of the subgraphs around it. */
  id(owner) {
    const search = (graph, prefix) => {
      for (const one of graph?.nodes ?? graph?._nodes ?? []) {
        if (one === owner) return prefix + one.id
        const inside = one.subgraph && search(one.subgraph, `${prefix}${one.id}:`)
        if (inside) return inside
      }
      return null
    }
    return search(this.root, '') ?? String(owner.id)
  }

  /**
   * Which of our nodes the graph has now.
   *
   * Not all frontends tell a node that it has gone: undo and another workflow drop subgraphs whole.
   */
  sweep() {
    const there = new Set(every(this.root))
    for (const all of [this.views, this.pickers, this.sends])
      for (const owner of all.keys()) if (!there.has(owner)) this.#gone(owner)
    for (const owner of there) this.#here(owner)
  }

  /** A graph is about to be loaded: by undo the same one, with new nodes that take over windows. */
  loading() {
    if (!this.#windows.size) this.#workflow = this.root?.id
    for (const owner of this.#owners) this.#boxes.set(this.id(owner), box(owner))
    for (const [owner, view] of this.views) {
      const window = view.release()
      if (window) this.#windows.set(this.id(owner), window)
    }
    clearTimeout(this.#late)
    this.#late = setTimeout(() => this.loaded(), LATE)
  }

  loaded() {
    clearTimeout(this.#late)
    this.sweep()
    const same = this.root?.id === this.#workflow
    for (const [id, window] of this.#windows) {
      const view = same ? this.views.get(this.get(id)) : null
      if (view) view.adopt(window)
      else window.popup.close()
    }
    this.#windows.clear()
    const before = new Map(this.#boxes)
    this.#boxes.clear()
    for (const ms of SETTLED) setTimeout(() => this.#exchange(before), ms)
  }

  get #owners() {
    return [...this.views.keys(), ...this.pickers.keys(), ...this.sends.keys()]
  }

  // Nodes 2.0 may take a node that is made anew for the one of the same id, and go on showing what
  // belonged to that: pictures would stand still
  #exchange(before) {
    for (const owner of this.#owners) {
      const [was, is] = [before.get(this.id(owner)), box(owner)]
      if (was && is && was !== is && was.isConnected && !is.isConnected) was.replaceWith(is)
    }
  }

  /** ComfyUI has made a node. */
  created(owner) {
    this.#name(owner)
    if (owner.comfyClass === 'LiveView') this.#addView(owner)
    if (owner.comfyClass === 'LiveCamera') this.#addPicker(owner)
    if (owner.comfyClass === 'LiveSend') this.#addSend(owner)
    if (SCHEDULES.includes(owner.comfyClass)) this.#addPlot(owner)
  }

  // the frontend translates what inputs are called, and not what may be chosen
  #name(owner) {
    const { words } = this.#of
    for (const widget of owner.widgets ?? []) {
      if (widget.type !== 'combo' || !owner.comfyClass?.startsWith('Live')) continue
      widget.options.getOptionLabel = (value) => words.option(owner.comfyClass, widget.name, value)
    }
  }

  #addView(owner) {
    const { parts, tools, still } = this.#of
    const view = new parts.View(owner, tools)
    this.#add(owner, view)
    after(owner, 'onConfigure', () => view.compare.read())
    after(owner, 'onExecuted', (output) => {
      const image = output?.live_images?.at(-1)
      if (image) view.still(still(image))
    })
  }

  // schedules show their steps as soon as they are known
  #addPlot(owner) {
    const { parts, tools } = this.#of
    after(owner, 'onExecuted', (output) => {
      const steps = output?.livediffusion_steps?.at(-1)
      if (!steps) return
      if (!this.#plots.has(owner)) this.#plots.set(owner, new parts.Plot(owner, tools))
      this.#plots.get(owner).show(JSON.parse(steps))
    })
  }

  #addSend(owner) {
    const { parts, tools } = this.#of
    this.#add(owner, new parts.Send(owner, tools))
  }

  #addPicker(owner) {
    const { parts, captures, tools, prompted } = this.#of
    const picker = new parts.Picker(owner, captures, tools)
    this.#add(owner, picker)
    // a copy gets its source after it was made, and no callback tells
    after(owner, 'onConfigure', () => picker.show())
    // nothing is added to the workflow for the picture that an ordinary prompt takes
    const source = owner.widgets?.find((widget) => widget.name === 'source')
    if (!source) return
    const serialize = source.serializeValue
    source.serializeValue = async function () {
      await prompted(owner, picker)
      return serialize ? serialize.apply(this, arguments) : source.value
    }
  }

  // one that was made to be copied comes to no graph, and leaves none
  #add(owner, part) {
    this.#made.set(owner, part)
    after(owner, 'onAdded', () => this.#here(owner))
    after(owner, 'onRemoved', () => {
      this.#gone(owner)
      // the node is still in the graph at this moment
      setTimeout(this.#of.gone)
    })
  }

  #all({ comfyClass }) {
    return { LiveView: this.views, LiveCamera: this.pickers, LiveSend: this.sends }[comfyClass]
  }

  #here(owner) {
    const part = this.#made.get(owner)
    const all = this.#all(owner)
    if (!part || all.has(owner)) return
    all.set(owner, part)
    part.begin?.()
  }

  #gone(owner) {
    if (this.#all(owner).delete(owner)) this.#made.get(owner).remove?.()
  }
}

/** The element that one of our nodes has on the canvas. */
function box(owner) {
  return owner.widgets?.find(({ name }) => name?.startsWith('livediffusion_'))?.element
}

/** The nodes of a graph, and those of the subgraphs in it. */
function* every(graph) {
  for (const one of graph?.nodes ?? graph?._nodes ?? []) {
    yield one
    if (one.subgraph) yield* every(one.subgraph)
  }
}

/** Have something done after what a node does by itself. */
function after(owner, name, then) {
  const before = owner[name]
  owner[name] = function (...of) {
    before?.apply(this, of)
    then(...of)
  }
}
