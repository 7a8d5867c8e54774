// The opened chunk: what it took, and what else could have come at its place.

import { ask } from "/page/api.js";
import { at, make, tell } from "/page/dom.js";
import { isExact, ofChunk, ofPool, percent, TEMPERATURES } from "/page/words.js";

const MOST_CANDIDATES = 10;

export class Inspector {
  constructor(about, settings) {
    this.about = about;
    this.settings = settings;
    this.text = null;
    this.number = 0;
    this.stopper = null;
    at("close").addEventListener("click", () => this.close());
    at("before").addEventListener("click", () => this.#step(-1));
    at("after").addEventListener("click", () => this.#step(1));
  }

  open(text, number) {
    if (this.text !== text) this.text?.mark();
    this.text = text;
    this.number = number;
    text.mark(number);
    at("legend").hidden = true;
    at("chunk").hidden = false;
    this.#describe(text.chunks[number]);
    text.buttons[number].scrollIntoView({ block: "nearest" });
    this.#askForPool();
  }

  // Back to the chunk in the text.
  close() {
    if (!this.text) return;
    const { text, number } = this;
    this.forget();
    if (text.element.isConnected) text.visit(number);
  }

  forget() {
    this.stopper?.abort();
    this.text?.mark();
    this.text = null;
    at("chunk").hidden = true;
    at("legend").hidden = false;
  }

  #step(by) {
    const number = this.number + by;
    if (this.text?.chunks[number]) this.open(this.text, number);
  }

  #describe(chunk) {
    const { text, number } = this;
    at("chunk-title").textContent = `Chunk ${number + 1} of ${text.chunks.length}`;
    at("before").setAttribute("aria-disabled", String(number === 0));
    at("after").setAttribute("aria-disabled", String(number === text.chunks.length - 1));
    at("chunk-tokens").replaceChildren(...this.#tokens(chunk));
    at("chunk-facts").textContent = ofChunk(chunk, text.how, this.about);
    at("pool").hidden = true;
    tell(at("pool-failure"));
    tell(at("pool-facts"), "Drawing alternatives …");
  }

  async #askForPool() {
    const { text, number, about } = this;
    this.stopper?.abort();
    const stopper = (this.stopper = new AbortController());
    const temperatures = [...new Set([...TEMPERATURES, text.how.temperature])].sort((a, b) => b - a);
    const body = {
      model: about.model,
      ...text.source,
      num_thoughts: text.how.thoughts,
      written: text.chunks.slice(0, number).flatMap((chunk) => chunk.token_ids),
      num_draws: about.draws,
      temperatures: temperatures.filter((one) => one === 0 || Math.ceil(1 / one) <= about.draws),
      most: MOST_CANDIDATES,
      seed: 0,
    };
    if (this.#isWhole(text.chunks[number])) body.chunk = text.chunks[number].token_ids;
    try {
      const pool = await (await ask("/v1/calm/pool", body, this.settings.key, stopper.signal)).json();
      this.#show(pool, text.chunks[number], text.how);
    } catch (error) {
      if (error.name === "AbortError") return;
      tell(at("pool-facts"));
      tell(at("pool-failure"), error.message);
    }
  }

  #show(pool, chunk, how) {
    const written = String(chunk.token_ids);
    const rows = pool.candidates.map((one) => this.#row(one, pool, how, String(one.token_ids) === written));
    at("pool").replaceChildren(headOf(pool, how), make("tbody", {}, ...rows));
    at("pool").hidden = false;
    tell(at("pool-facts"), ofPool(pool, how));
  }

  #row(candidate, pool, how, isWritten) {
    const name = make("th", { scope: "row" }, make("span", {}, ...this.#tokens(candidate)));
    if (isWritten) name.append(make("small", { textContent: "in the text" }));
    const draws = make("td", { className: "draws", textContent: candidate.count });
    draws.style.setProperty("--share", candidate.count / pool.candidates[0].count);
    const shares = (isExact(pool, how) && candidate.probabilities) || candidate.chances;
    const cells = shares.map((share, place) => {
      const cell = make("td", { textContent: share === null ? "–" : percent(share), className: "share" });
      cell.style.setProperty("--share", share ?? 0);
      cell.classList.toggle("chosen", pool.temperatures[place] === how.temperature);
      return cell;
    });
    return make("tr", { className: isWritten ? "written" : "" }, name, draws, ...cells);
  }

  // Not where the text had room for a part of it only.
  #isWhole(chunk) {
    return chunk.token_ids.length === this.about.chunk_size || this.text.hasEnd(chunk);
  }

  #tokens({ token_ids, tokens }) {
    return token_ids.map((token, place) => this.about.eos_token_ids.includes(token)
      ? make("span", { className: "token end", textContent: "end" })
      : make("span", { className: "token", textContent: tokens[place].replaceAll("\n", "⏎") }));
  }
}

function headOf(pool, how) {
  const temperatures = pool.temperatures.map((temperature) => {
    const cell = make("th", { scope: "col" }, make("span", { textContent: temperature }));
    if (temperature === how.temperature) {
      cell.className = "chosen";
      cell.setAttribute("aria-current", "true");
      cell.append(make("small", { textContent: "chosen" }));
    }
    return cell;
  });
  return make("thead", {},
    make("tr", {},
      make("th", { scope: "col", rowSpan: 2, textContent: "Candidate" }),
      make("th", { scope: "col", rowSpan: 2, textContent: "Draws", className: "draws" }),
      make("th", { scope: "colgroup", colSpan: temperatures.length, textContent: "Probability in % at T =" })),
    make("tr", {}, ...temperatures));
}
