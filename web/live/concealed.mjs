// Secrets that were typed into addresses leave the page: a saved workflow has names for them.

/**
 * Put what the server answers into the nodes, in place of what was typed.
 *
 * Only where a widget still has what was sent: what was typed since then stays, and comes with the
 * next answer.
 *
 * @param concealed of the answer to start or update: {node id: {input: text}}
 * @param sent the prompt as it was posted: {node id: {inputs}}
 * @param node (id) => the node of the graph, or nothing
 * @returns how many widgets have another text now
 */
export function conceal(concealed, sent, node) {
  let count = 0
  for (const [id, inputs] of Object.entries(concealed ?? {})) {
    const widgets = node(id)?.widgets ?? []
    for (const [name, text] of Object.entries(inputs)) {
      const widget = widgets.find((one) => one.name === name)
      if (!widget || widget.value === text || widget.value !== sent[id]?.inputs?.[name]) continue
      widget.value = text
      count += 1
    }
  }
  return count
}
