// A form that has a text written, chunk by chunk, until it ends or is stopped.

import { ask, events } from "/page/api.js";
import { announce } from "/page/dom.js";

export class Writer {
  constructor(form) {
    this.write = form.querySelector(".primary");
    this.stop = form.querySelector(".stop");
    this.stopper = null;
    this.stop.addEventListener("click", () => this.stopper?.abort());
  }

  get isBusy() {
    return this.stopper !== null;
  }

  // Adds what the server writes to a text. Gives why it ended, how long it took, and what went wrong, if it did.
  async fill(text, path, body, key) {
    const begin = performance.now();
    let reason = null, failure = null;
    this.#change(new AbortController());
    announce("Writing.");
    try {
      const request = { ...body, ...text.source, stream: true, return_chunks: true };
      for await (const event of events(await ask(path, request, key, this.stopper.signal))) {
        const [choice] = event.choices;
        const said = choice.text ?? choice.delta.content ?? "";
        for (const chunk of choice.chunks ?? []) text.add(chunk, said);
        reason = choice.finish_reason ?? reason;
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else failure = error;
    } finally {
      this.#change(null);
    }
    return { reason, failure, seconds: (performance.now() - begin) / 1000 };
  }

  // Swaps the two buttons, and the focus with them.
  #change(stopper) {
    this.stopper = stopper;
    const [shown, hidden] = stopper ? [this.stop, this.write] : [this.write, this.stop];
    const hadFocus = document.activeElement === hidden;
    shown.hidden = false;
    hidden.hidden = true;
    if (hadFocus) shown.focus();
  }
}
