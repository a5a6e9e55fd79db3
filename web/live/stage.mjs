// ComfyUI's App mode: a workflow without its canvas, as one wants it on a stage.
//
// It shows widgets that the workflow's author chose, ours too, and what runs have saved. A live run
// saves nothing, and the action bar with the Live button is away with the canvas. So while App mode
// is on, the button is also above Run, and Live Views that were chosen as outputs are in the middle.
// ComfyUI has no place for that which an extension could ask for: the two are found in the page.

const OFTEN = 300 // ms between two looks
const MIDDLE = '[data-testid="linear-center-panel"]'
const RUN = '[data-testid="linear-run-button"]'

export class Stage {
  #panel = null

  /**
   * @param tools element()
   * @param mode gives the mode of the open workflow, 'graph', 'app' or one of the builder's
   * @param chosen gives the Views of the nodes that are outputs of the app
   * @param button makes a Live button, or gives null where there is nothing to be live
   */
  constructor(tools, mode, chosen, button) {
    this.tools = tools
    this.mode = mode
    this.chosen = chosen
    this.makeButton = button
    setInterval(this.look, OFTEN)
  }

  look = () => {
    const on = this.mode() === 'app'
    this.#button(on ? document.querySelector(RUN) : null)
    this.#middle(on ? document.querySelector(MIDDLE) : null)
  }

  #button(run) {
    const there = document.querySelector('.livediffusion-run')
    const wanted = run && run !== there?.parentElement ? this.makeButton() : there
    if (there && (there !== wanted || !run)) there.remove()
    if (!run || !wanted || wanted === there) return
    wanted.classList.add('livediffusion-run')
    run.prepend(wanted)
  }

  #middle(middle) {
    const views = middle ? this.chosen() : []
    if (!views.length) return this.#leave()
    const boxes = views.map((view) => view.widget.element)
    this.#panel ??= this.tools.element('div', { className: 'livediffusion-app' })
    if (this.#panel.parentElement !== middle) middle.append(this.#panel)
    // on its way out of App mode ComfyUI takes them back to their nodes
    if (boxes.some((box) => box.parentElement !== this.#panel)) this.#panel.replaceChildren(...boxes)
  }

  #leave() {
    if (!this.#panel) return
    this.#panel.remove()
    this.#panel = null
  }
}
