// Continues a prompt.

import { ChunkedText } from "/page/chunks.js";
import { announce, at, copy, make, tell } from "/page/dom.js";
import { ofChunks, ofText } from "/page/words.js";
import { Writer } from "/page/writing.js";

export class Continue {
  constructor(about, settings, inspector) {
    Object.assign(this, { about, settings, inspector, section: at("continue") });
    this.writer = new Writer(this.#part("form"));
    this.#part(".guide p").textContent = `The model continues your prompt ${ofChunks(about)}. Open any `
      + "chunk to see what else could have come in its place, and how temperature changes the odds.";
    this.#part("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.#part(".copy").addEventListener("click", (event) => copy(at("text").textContent, event.target));
  }

  async submit() {
    if (this.writer.isBusy || !this.settings.check()) return;
    const prompt = at("prompt").value;
    const text = new ChunkedText({ prompt }, this.settings.how, this.about.eos_token_ids,
      (...opened) => this.inspector.open(...opened));
    this.inspector.forget();
    this.#begin(make("span", { className: "prompt", textContent: prompt }), text.element);
    const body = { model: this.about.model, ...this.settings.arguments };
    this.#end(text, await this.writer.fill(text, "/v1/completions", body, this.settings.key));
  }

  #begin(...parts) {
    tell(this.#part(".failure"));
    this.#part(".guide").hidden = true;
    this.#part(".foot").hidden = true;
    at("text").hidden = false;
    at("text").replaceChildren(...parts);
  }

  #end(text, { reason, failure, seconds }) {
    const said = ofText(text.chunks, reason, seconds, text.how);
    const isEmpty = text.chunks.length === 0;
    const isToldHere = failure !== null && !this.settings.refuse(failure);
    at("text").hidden = this.#part(".foot").hidden = isEmpty;
    this.#part(".guide").hidden = !isEmpty || isToldHere;
    this.#part(".done").textContent = said;
    if (isToldHere) tell(this.#part(".failure"), failure.message);
    if (!failure) announce(`${said}. Chunks can be opened: Tab to the text, then arrow keys and Enter.`);
  }

  #part(selector) {
    return this.section.querySelector(selector);
  }
}
