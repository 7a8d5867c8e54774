// The fields beside the prompt: their ranges, what they say of a request, and refusals at their place.

import { at, make, tell } from "/page/dom.js";
import { samplerOf } from "/page/words.js";

// Which field shows the refusal of which argument of a request.
const FIELDS = {
  max_tokens: "tokens", max_completion_tokens: "tokens", max_draws: "draws", num_draws: "draws",
  num_thoughts: "thoughts", seed: "seed", sampler: "sampler", temperature: "temperature", key: "key", prompt: "prompt",
};
const LONGEST_AT_FIRST = 120;

export class Settings {
  constructor(about) {
    this.about = about;
    at("temperature").value = about.temperature;
    at("tokens").max = about.max_tokens;
    at("tokens").value = Math.min(LONGEST_AT_FIRST, about.max_tokens);
    at("draws").max = about.max_draws;
    at("draws").value = about.draws;
    // Only models that were trained to think take any.
    at("thoughts-field").hidden = at("thoughts").disabled = about.num_thoughts === null;
    at("thoughts").max = about.max_thoughts;
    at("thoughts").value = about.num_thoughts;
    at("key-field").hidden = !about.needs_key;
    const samplers = about.lowest_temperature < 1 ? ["head", "exact", "pool"] : ["exact", "pool"];
    at("sampler").append(...samplers.map((name) => make("option", { value: name, textContent: name })));
    at("more").addEventListener("click", () => this.unfold(at("settings").hidden));
    for (const name of ["temperature", "sampler"]) at(name).addEventListener("input", () => this.#show());
    for (const name of new Set(Object.values(FIELDS))) {
      at(name).setAttribute("aria-describedby", `${name}-wrong`);
      at(name).addEventListener("input", () => this.#blame(name));
    }
    this.#show();
    if (about.needs_key) this.unfold(true);
  }

  get key() {
    return at("key").value;
  }

  get how() {
    const temperature = Number(at("temperature").value);
    const how = { temperature, sampler: samplerOf(this.about, at("sampler").value, temperature) };
    return at("thoughts").disabled ? how : { ...how, thoughts: Number(at("thoughts").value) };
  }

  get arguments() {
    const { temperature, thoughts } = this.how;
    const chosen = { temperature, num_thoughts: thoughts, max_tokens: Number(at("tokens").value) };
    if (!at("draws").disabled) chosen.max_draws = chosen.num_draws = Number(at("draws").value);
    if (at("sampler").value) chosen.sampler = at("sampler").value;
    if (at("seed").value) chosen.seed = Number(at("seed").value);
    return chosen;
  }

  unfold(isOpen) {
    at("settings").hidden = !isOpen;
    at("more").setAttribute("aria-expanded", String(isOpen));
  }

  // Whether all fields hold what they may; the first that does not is shown and told.
  check() {
    for (const name of ["tokens", "draws", "thoughts", "seed"]) {
      const field = at(name);
      if (field.disabled || field.validity.valid) continue;
      const range = `A whole number from ${field.min} to ${Number(field.max).toLocaleString("en")}.`;
      this.#blame(name, name === "seed" ? "A whole number of up to 15 digits, or empty for a random one." : range);
      return false;
    }
    return true;
  }

  // Shows what the server refuses at its field; whether there is one.
  refuse(refusal) {
    const name = FIELDS[refusal.field];
    if (!name || at(name).closest("[hidden]:not(#settings)")) return false;
    this.#blame(name, refusal.message);
    return true;
  }

  #blame(name, sentence = "") {
    const field = at(name);
    tell(at(`${name}-wrong`), sentence);
    if (!sentence) {
      field.removeAttribute("aria-invalid");
      return;
    }
    field.setAttribute("aria-invalid", "true");
    if (at("settings").contains(field)) this.unfold(true);
    field.focus();
  }

  #show() {
    const { temperature, sampler } = this.how;
    at("temperature-shown").textContent = temperature.toFixed(2);
    at("draws").disabled = sampler === "head" || temperature === 1;
    at("draws-note").hidden = !at("draws").disabled;
  }
}
