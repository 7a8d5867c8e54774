// Talks with a model whose tokenizer has a chat template.

import { ChunkedText } from "/page/chunks.js";
import { announce, at, copy, make, tell } from "/page/dom.js";
import { ofChunks, ofText } from "/page/words.js";
import { Writer } from "/page/writing.js";

export class Chat {
  constructor(about, settings, inspector) {
    Object.assign(this, { about, settings, inspector, section: at("chat"), said: [] });
    this.writer = new Writer(this.#part("form"));
    this.guide = "Say something to begin. The model answers " + ofChunks(about) + "; open any chunk to see what else could have come.";
    tell(this.#part(".guide"), this.guide);
    this.#part("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    at("message").addEventListener("input", () => tell(at("message-wrong")));
    at("new").addEventListener("click", () => this.#clear());
  }

  async submit() {
    if (this.writer.isBusy || !this.settings.check()) return;
    const message = at("message").value;
    if (!message.trim()) {
      tell(at("message-wrong"), "Write a message first.");
      at("message").focus();
      return;
    }
    const system = at("system").value.trim() ? [{ role: "system", content: at("system").value }] : [];
    const asked = { role: "user", content: message };
    const text = new ChunkedText({ messages: [...system, ...this.said, asked] }, this.settings.how,
      this.about.eos_token_ids, (...opened) => this.inspector.open(...opened));
    const turns = [turn("user", "You", message), turn("assistant", this.about.model, text.element)];
    this.#begin(turns);
    const body = { model: this.about.model, ...this.settings.arguments };
    const outcome = await this.writer.fill(text, "/v1/chat/completions", body, this.settings.key);
    this.#end(asked, text, turns, outcome);
  }

  #begin(turns) {
    tell(this.#part(".failure"));
    tell(this.#part(".guide"));
    at("new").hidden = true;
    at("message").value = "";
    at("turns").append(...turns);
    this.#part("form").scrollIntoView({ block: "nearest" });
  }

  #end(asked, text, turns, { reason, failure, seconds }) {
    if (failure && !this.settings.refuse(failure)) tell(this.#part(".failure"), failure.message);
    if (text.chunks.length === 0) {
      // Nothing came of it, so the message goes back to where it was written.
      for (const one of turns) one.remove();
      at("message").value ||= asked.content;
    } else {
      this.said.push(asked, { role: "assistant", content: text.said });
      const done = ofText(text.chunks, reason, seconds, text.how);
      const button = make("button", { type: "button", className: "quiet copy", textContent: "Copy" });
      button.addEventListener("click", () => copy(text.said, button));
      turns[1].append(make("div", { className: "foot" }, make("p", { className: "done", textContent: done }), button));
      if (!failure) announce(`${done}. ${text.said}`);
    }
    this.#part(".hint").hidden = at("new").hidden = this.said.length === 0;
    if (this.said.length === 0) tell(this.#part(".guide"), this.guide);
    this.#part("form").scrollIntoView({ block: "nearest" });
  }

  #clear() {
    this.said = [];
    this.inspector.forget();
    at("turns").replaceChildren();
    this.#part(".hint").hidden = at("new").hidden = true;
    tell(this.#part(".failure"));
    tell(this.#part(".guide"), this.guide);
    at("message").focus();
  }

  #part(selector) {
    return this.section.querySelector(selector);
  }
}

function turn(role, speaker, content) {
  return make("li", { className: role }, make("p", { className: "speaker", textContent: speaker }),
    make("div", { className: "bubble" }, content));
}
