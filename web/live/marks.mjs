// Nodes that something is wrong with, outlined until it is well again.

export class Marks {
  #app
  #node
  #marked = new Set()

  /**
   * @param app ComfyUI's app
   * @param node gives the node of an execution id, or nothing
   */
  constructor(app, node) {
    this.#app = app
    this.#node = node
  }

  /** Outline the nodes of these execution ids. */
  add(ids) {
    for (const id of ids) {
      const found = this.#node(id)
      if (!found) continue
      this.#set(found, true)
      this.#marked.add(found)
    }
    this.#app.canvas?.setDirty?.(true, true)
  }

  clear() {
    for (const found of this.#marked) this.#set(found, false)
    this.#marked.clear()
    this.#app.canvas?.setDirty?.(true, true)
  }

  #set(found, value) {
    const oldValue = found.has_errors
    found.has_errors = value
    // Nodes 2.0 draws a copy of the node's state, and hears of changes this way
    const type = 'node:property:changed'
    const change = { type, nodeId: found.id, property: 'has_errors', oldValue, newValue: value }
    found.graph?.trigger?.(type, change)
    // ... or, since 1.58, of ComfyUI's own errors only
    const drawn = document.querySelector(`[data-node-id="${found.id}"]`)
    if (found.graph === this.#app.canvas?.graph)
      drawn?.toggleAttribute('data-livediffusion-error', value)
  }
}
