// Runs that go on without a page: keep one, find the one of the workflow that is open, end it.

const LOOK = 600 // ms after a workflow was loaded, for ComfyUI to be done with it

export class Kept {
  #of
  #looking = 0
  #said = ''

  /**
   * @param of app and api (ComfyUI's), say (see words.mjs), notify(severity, summary, detail),
   *   complain(error), begin(how), session() what the page has now
   */
  constructor(of) {
    this.#of = of
    this.commands = [
      {
        id: 'livediffusion.keep',
        label: 'Live: keep running without a page',
        icon: 'pi pi-lock',
        function: () => this.keep()
      },
      {
        id: 'livediffusion.end',
        label: 'Live: stop what runs without a page',
        icon: 'pi pi-lock-open',
        function: () => this.end()
      }
    ]
    this.menu = this.commands.map(({ id }) => id)
    this.setting = {
      id: 'livediffusion.startUnattended',
      category: ['LiveDiffusion', 'Live', 'startUnattended'],
      name: of.say('startUnattended'),
      tooltip: of.say('startUnattendedTip'),
      type: 'boolean',
      defaultValue: false
    }
  }

  get #root() {
    return this.#of.app.rootGraph ?? this.#of.app.graph
  }

  /** Have the run of this page go on without it; start one if there is none. */
  async keep() {
    const { app, say, notify, complain, begin, session } = this.#of
    if (session()?.leaving) return
    const name = String(app.extensionManager?.workflow?.activeWorkflow?.filename ?? '').slice(0, 80)
    try {
      if (session()) await session().keep(name)
      else await begin({ unattended: true, name })
      const mine = session()
      if (!mine?.run) return
      notify('success', say('live'), say('kept', { name }))
      if (mine.warning) notify('warn', say('live'), mine.warning)
    } catch (error) {
      complain(error)
    }
  }

  /** Stop what runs without a page, whichever workflow it is of. */
  async end() {
    const { say, notify, complain } = this.#of
    try {
      const runs = await this.#runs()
      for (const { run, name } of runs) {
        await this.#ask('end', { method: 'POST', body: JSON.stringify({ run }) })
        notify('info', say('live'), say('keptStopped', { name }))
      }
      if (!runs.length) notify('info', say('live'), say('noneKept'))
    } catch (error) {
      complain(error)
    }
  }

  /** A workflow was loaded: if it is the one of a kept run, come to it. */
  look() {
    clearTimeout(this.#looking)
    this.#looking = setTimeout(() => this.#find().catch(() => {}), LOOK)
  }

  async #find() {
    const { begin, session } = this.#of
    const id = this.#root?.id
    if (!id || session()) return
    const found = (await this.#runs()).find(({ workflow }) => workflow === id)
    if (found && !session() && this.#root?.id === id) await begin({ run: found.run })
  }

  /**
   * Say why a kept run begins anew, or this page is no more on it, once for each reason.
   *
   * @param detail of an event `state`
   * @return whether there is a node to be marked
   */
  failed({ state, reason, node, final }) {
    const { app, say, notify } = this.#of
    if (state === 'live') this.#said = ''
    if ((state !== 'failed' && state !== 'again') || !reason || reason === this.#said) return false
    this.#said = reason
    const title = node && app.rootGraph?.getNodeById?.(Number(node))?.title
    const of = title ?? (node ? say('node', { id: node }) : say('live'))
    notify('error', of, final ? reason : say('keptAgain', { reason }))
    return Boolean(node)
  }

  async #runs() {
    return (await this.#ask('runs')).runs
  }

  async #ask(route, options = {}) {
    const reply = await this.#of.api.fetchApi(`/livediffusion/${route}`, options)
    const answer = await reply.json()
    if (!reply.ok) throw new Error(answer.error?.message ?? reply.statusText)
    return answer
  }
}
