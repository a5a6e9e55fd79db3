// What the page says, in the frontend's language.
//
// English is here, as JSON, so that tests can read it; other languages are in locales/<language>/ at
// the pack's top, where ComfyUI looks for them: main.json has this table under "livediffusion", and
// nodeDefs.json what options are called, which ComfyUI itself does not translate. {name} is filled in.

const ENGLISH = {
  "live": "Live",
  "starting": "Starting",
  "waiting": "Waiting",
  "waitingCount": "Waiting ({count})",
  "stop": "Stop",
  "stopping": "Stopping",
  "idleTip": "Live: run this workflow on the camera until stopped",
  "startingTip": "Loading models; click to stop",
  "queuedTip": "Waiting for the prompts before this one; click to stop",
  "aheadOneTip": "Waiting for 1 prompt to finish; click to stop",
  "aheadTip": "Waiting for {count} prompts to finish; click to stop",
  "liveTip": "Stop the live run",
  "stoppingTip": "The live run is stopping",
  "aheadNote": "Waiting for {count} prompt(s) before this one.",
  "node": "node {id}",
  "notTaken": "{file} was not taken: {reason}",
  "notRun": "Not run while live: {nodes}.",
  "failed": "The live run failed.",
  "notChangedNode": "{node}: not changed",
  "notRecorded": "{node}: not recorded",
  "recorded": "{node}: recorded",
  "recordedFile": "{file}, {seconds} s",
  "recordedGaps": "{file}, {seconds} s; {count} frame(s) left out: the disk or the encoder is too slow",
  "otherWorkflow": "Stopped, because another workflow was opened.",
  "ended": "Live has ended",
  "noneLeft": "No {node} is left: deleted, muted or bypassed.",
  "notChanged": "Not changed",
  "notArrived": "It did not reach ComfyUI ({reason}). It is sent again until it does.",
  "disconnected": "The camera was disconnected.",
  "LiveCamera": "Live Camera",
  "LiveSend": "Live Send",
  "LiveView": "Live View",
  "refused": "The server refused the graph.",
  "broke": "The connection to ComfyUI broke.",
  "notLoaded": "A part of this page did not load. Reload the page; if that does not help, use a newer browser.",
  "noGraph": "ComfyUI did not give the graph.",
  "camera": "Camera",
  "cameraWidget": "camera",
  "cameraNumber": "Camera {number}",
  "defaultCamera": "Default camera",
  "cameraTip": "The camera of this computer. Not part of the workflow.",
  "cameraOff": "The camera is off",
  "cameraSlower": "The camera gives {given} fps, not {wanted}",
  "NotAllowedError": "The browser does not allow this page to use the camera. Allow it with the camera symbol in the address bar, then press Live again.",
  "NotFoundError": "No camera was found. Connect one, or set the Live Camera to a file.",
  "NotReadableError": "The camera is in use by another program. Close that program, then press Live again.",
  "OverconstrainedError": "The chosen camera is gone. Choose another one on the Live Camera.",
  "AbortError": "The camera stopped before it gave a picture. Try again.",
  "cameraFails": "The camera does not open: {reason}",
  "insecure": "The camera needs https or localhost. Open ComfyUI as http://localhost or start it with --tls-keyfile and --tls-certfile.",
  "try": "Try",
  "off": "Off",
  "tryTip": "Open the camera to see its picture; again to close it.",
  "upload": "Upload",
  "uploadFile": "Upload a video or animated picture",
  "uploadTip": "Into ComfyUI's input folder.",
  "playsLive": "Plays while live",
  "pressLive": "Press Live",
  "firstPicture": "Waiting for the first picture",
  "inputUnknown": "The input shows while live",
  "figures": "{fps} fps, {latency} ms, {skipped} skipped, {dropped} dropped",
  "transport": "How pictures travel",
  "transportTip": "WebSocket: each picture as a JPEG, best in a local network. WebRTC: as video, which adapts to slow and far networks; the server needs the Python package aiortc. It holds from the next start of Live on.",
  "noWebRtc": "WebRTC is chosen in the settings, but this server has no aiortc. Pictures go by the WebSocket.",
  "linkFigures": "{down} Mbit/s in, {up} out, {trip} ms round trip",
  "figuresTip": "frames through the graph per second; from capture to here (median); {frames} frames, {calls} UNet calls, {refused} refused",
  "sampled": "sampled {road}",
  "picture": "picture",
  "window": "Window",
  "windowTip": "Show the pictures in a window of their own. Double click there for full screen.",
  "windowBlocked": "The browser blocked the window. Allow pop-ups for this page.",
  "copyUrl": "Copy URL",
  "copyUrlTip": "Copy the address of these pictures as an MJPEG stream, for OBS and browsers.",
  "copyWhepTip": "With Shift: its address for players of WebRTC (WHEP)",
  "addressCopied": "MJPEG address copied",
  "address": "MJPEG address",
  "snapshot": "Snapshot",
  "snapshotTip": "Write this picture, with the workflow in it, to the output folder as a PNG.",
  "snapshotOffTip": "While live only. To keep the pictures of an ordinary run, add a Save Image node.",
  "compare": "Compare with the input",
  "compareOff": "Output only",
  "compareSide": "Compare: input beside output",
  "compareLine": "Compare: input and output on either side of a line that you drag",
  "line": "Line between input and output",
  "lineAt": "{input} % input, {output} % output",
  "input": "Input",
  "output": "Output",
  "steps": "steps",
  "noiseLevels": "noise levels",
  "step": "step {step}: {level}",
  "visitStart": "Start",
  "visitAgain": "Start again",
  "visitLimit": "You have {time}.",
  "visitPrivacy": "The camera's picture is sent to this server, changed and shown back to you. It is not kept.",
  "visitNoCamera": "Your camera is not used.",
  "visitAsking": "The browser asks for the camera now: please allow it.",
  "visitLooking": "Looking for a free place",
  "visitPlace": "{place} of {of} in line",
  "visitWait": "About {time} to go",
  "visitWarming": "A machine is getting ready",
  "visitUnknown": "It starts as soon as a place is free",
  "visitOverGone": "It has ended. Start again whenever you like.",
  "visitOverNowhere": "No machine could take it. Try again in a few minutes.",
  "visitNotTaken": "This does not work here. It goes on as before.",
  "visitTurn": "It is your turn",
  "visitRunning": "The picture is live",
  "visitLeave": "Leave the line",
  "visitLeft": "{time} left",
  "visitMoving": "Moving to another machine. One moment.",
  "visitRestart": "The machine starts again. Your settings are kept.",
  "visitLost": "The machine is gone. Looking for another one; your settings are kept.",
  "visitOffline": "You are offline. It goes on when the network is back.",
  "visitHouseAway": "The server does not answer. Trying again.",
  "visitHouseMany": "There are too many visitors from your network right now. Trying again.",
  "visitOverTime": "Your time is up. Thank you for being here.",
  "visitOverOperator": "The operator has ended this.",
  "visitOverFull": "There are too many people here now. Try again in a few minutes.",
  "visitOverLeft": "You have stopped.",
  "visitOverClosed": "This closes now. Thank you for being here.",
  "visitFailed": "It did not work: {reason}",
  "visitElsewhere": "It goes on in another window.",
  "visitCameraAgain": "Open the camera again",
  "visitSilent": "The camera gives no picture.",
  "visitSettings": "Settings",
  "visitReset": "As it was",
  "visitAnother": "Another",
  "visitFull": "Full screen",
  "visitFigures": "{fps} fps, {latency} ms",
  "visitNotAllowed": "The browser does not allow the camera here. Allow it with the camera symbol in the address bar, then press Start.",
  "visitNotFound": "No camera was found. Connect one, then press Start.",
  "visitNotReadable": "The camera is in use by another program. Close that program, then press Start.",
  "visitCameraGone": "The chosen camera is gone. Choose another one.",
  "visitInsecure": "The camera needs a secure address (https). Please tell the people who run this page.",
  "visitBroke": "The connection broke.",
  "keptTip": "Runs without a page; click to stop it for everybody",
  "againTip": "It failed and is started again; click to stop it for everybody",
  "kept": "{name} is kept running: it goes on without this page. Stop ends it for everybody.",
  "keptStopped": "{name} is kept running no more.",
  "noneKept": "Nothing is kept running.",
  "keptAgain": "{reason}\nIt is started again.",
  "startUnattended": "Start what is kept running with ComfyUI",
  "startUnattendedTip": "A live run that was kept running without a page begins again when ComfyUI starts.",
  "screen": "Screen",
  "screenOff": "Nothing is shared",
  "screenChoose": "Choose",
  "screenChooseTip": "Choose a screen, a window or a tab to share. The browser asks.",
  "screenEnded": "Sharing has ended. Press Choose to go on.",
  "screenNotAllowed": "No screen was chosen. Press Live again, and choose a screen, a window or a tab.",
  "screenNoPress": "The browser asks for a screen only just after a click. Press Choose on the Live Camera.",
  "screenNotHere": "This browser cannot share a screen.",
  "screenSilent": "What was chosen gives no picture. Press Live again, and choose something else.",
  "screenFails": "The screen cannot be shared: {reason}",
  "screenInsecure": "Sharing a screen needs https or localhost. Open ComfyUI as http://localhost or start it with --tls-keyfile and --tls-certfile.",
  "namesTip": "What there is to choose from at the server.",
  "senderFirst": "The first there is",
  "deviceChoose": "Choose a camera",
  "sourceGiving": "{fps} fps",
  "sourceShown": "Connected",
  "sourceConnecting": "Connecting",
  "sourceWaiting": "Lost; trying again",
  "sourceRefused": "Cannot be opened",
  "phone": "Phone",
  "phoneOff": "Press Live: a code for the phone shows here",
  "phoneCopy": "Copy address",
  "phoneCopyTip": "Copy the one-time address that the code holds.",
  "phoneNew": "New code",
  "phoneNewTip": "Another one-time code. A phone that has the one before is let go.",
  "phoneCode": "Code for the phone; click to enlarge",
  "phoneScan": "Scan this with the phone's camera.",
  "phoneAsking": "Scan it with the phone",
  "phoneLocal": "Phones cannot reach ComfyUI: it listens to this computer only. Start it with run.py live --lan, or with --listen, --tls-keyfile and --tls-certfile.",
  "phoneInsecure": "Phones open their camera on https addresses only. Start ComfyUI with run.py live --lan, or with --tls-keyfile and --tls-certfile.",
  "phoneNoCode": "Open {url} on the phone. For a code to scan: pip install segno",
  "phoneTitle": "This phone, live",
  "phoneWhat": "Its camera goes to the live run at {host}, and nowhere else. Nothing is kept.",
  "phoneTurn": "Front or back camera",
  "phoneSending": "Live, {fps} fps",
  "phoneQueued": "The run has not begun yet",
  "phoneUnused": "The run does not use this camera now",
  "phoneLost": "The connection is lost. Trying again.",
  "phoneTaken": "Another phone has this code. A code is for one phone: press New code on the Live Camera, and scan that.",
  "phoneOver": "The live run is over. You can close this page.",
  "phoneUnknown": "This code is over. Scan the one on the Live Camera anew.",
  "whipOff": "Press Live: the address to publish to can be copied then",
  "whipCopy": "Copy WHIP address",
  "whipCopyTip": "Copy the address to publish to, for OBS or another program.",
  "whipToken": "Copy token",
  "whipTokenTip": "Copy the bearer token, for a program that asks for one.",
  "copied": "Copied",
  "copyThis": "To be copied",
  "allow": "Allow",
  "allowTip": "Let ComfyUI open this from now on. Only the server's own page can say so.",
  "notAllowed": "{what} is not allowed yet. Press Allow if you trust it.",
  "nowAllowed": "{what} is allowed now. Press Live.",
  "sendWidget": "sending",
  "sendIdle": "No picture yet",
  "sendConnecting": "Connecting",
  "sendSending": "{sent} sent, {dropped} dropped",
  "sendWaiting": "Lost, trying again; {sent} sent, {dropped} dropped",
  "sendRefused": "Nothing can be sent"
}

const ALL = '/i18n' // ComfyUI's route: what every pack has in its locales folder, by language

export class Words {
  #api
  #language
  #loading = null
  #all = {}

  /**
   * @param api ComfyUI's api
   * @param language gives the frontend's language, "en" or another
   */
  constructor(api, language) {
    this.#api = api
    this.#language = language
  }

  /** Have the words of the frontend's language at hand; English needs nothing. */
  async load() {
    if (this.#language() === 'en') return
    try {
      this.#all = await (this.#loading ??= this.#fetch())
    } catch (error) {
      this.#loading = null
      console.warn('LiveDiffusion speaks English:', error)
    }
  }

  /** A text of the table, with its places filled in. */
  say = (key, values = {}) =>
    (this.#mine.livediffusion?.[key] ?? ENGLISH[key]).replace(/\{(\w+)\}/g, (place, name) =>
      String(values[name] ?? place)
    )

  /** What an option of a node's input is called; itself where it has no other name. */
  option(node, input, value) {
    const { options } = this.#mine.nodeDefs?.[node]?.inputs?.[input] ?? {}
    return options?.[value] ?? value
  }

  /** {name, tooltip} of a node's input; without what has no other words than English ones. */
  input(node, input) {
    return this.#mine.nodeDefs?.[node]?.inputs?.[input] ?? {}
  }

  get #mine() {
    return this.#all[this.#language()] ?? {}
  }

  async #fetch() {
    const reply = await this.#api.fetchApi(ALL)
    if (!reply.ok) throw new Error(reply.statusText)
    return reply.json()
  }
}
