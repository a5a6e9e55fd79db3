// The line below an engine's node. Newer frontends take a node's line away when its run is over; an
// engine's is said again.

const ENGINES = ['LiveCompile', 'LiveTensorRTLoader', 'LiveTensorRTBuild']

export class Lines {
  #said = new Map() // execution id -> what it said last

  /**
   * @param api ComfyUI's api
   * @param node gives the node of an execution id, or nothing
   */
  constructor(api, node) {
    api.addEventListener('progress_text', ({ detail: { nodeId, text } }) => {
      if (ENGINES.includes(node(nodeId)?.comfyClass)) this.#said.set(String(nodeId), text)
    })
    const again = () =>
      setTimeout(() => {
        for (const [nodeId, text] of this.#said) {
          const shown = node(nodeId)?.widgets?.some(({ name }) => name === '$$node-text-preview')
          if (!shown) api.dispatchCustomEvent('progress_text', { nodeId, text })
        }
      })
    for (const end of ['success', 'error', 'interrupted'])
      api.addEventListener(`execution_${end}`, again)
  }

  /** Another workflow is opened. */
  clear() {
    this.#said.clear()
  }
}
