// A form that has a text written, chunk by chunk, until it ends or is stopped.

import { post, events } from "/page/api.js";
import { announce } from "/page/dom.js";

export class Writer {
  constructor(form) {
    this.writeButton = form.querySelector(".primary");
    this.stopButton = form.querySelector(".stop");
    this.abortController = null;
    this.stopButton.addEventListener("click", () => this.abortController?.abort());
  }

  get isBusy() {
    return this.abortController !== null;
  }

  // Adds what the server writes to a text. Returns why it ended, how long it took, and the error if it failed.
  async fill(text, path, body, key) {
    const begin = performance.now();
    let reason = null, failure = null;
    this.#setController(new AbortController());
    announce("Writing.");
    try {
      const request = { ...body, ...text.source, stream: true, return_chunks: true };
      for await (const event of events(await post(path, request, key, this.abortController.signal))) {
        const [choice] = event.choices;
        const written = choice.text ?? choice.delta.content ?? "";
        for (const chunk of choice.chunks ?? []) text.add(chunk, written);
        reason = choice.finish_reason ?? reason;
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else failure = error;
    } finally {
      this.#setController(null);
    }
    return { reason, failure, seconds: (performance.now() - begin) / 1000 };
  }

  // Sets what stops the text, null when it has ended; swaps the two buttons, and the focus with them.
  #setController(abortController) {
    this.abortController = abortController;
    const [shown, hidden] = abortController ? [this.stopButton, this.writeButton] : [this.writeButton, this.stopButton];
    const hadFocus = document.activeElement === hidden;
    shown.hidden = false;
    hidden.hidden = true;
    if (hadFocus) shown.focus();
  }
}
