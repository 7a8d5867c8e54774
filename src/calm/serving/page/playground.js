"use strict";

// The chunks of the text that is shown: {token_ids, tokens, num_draws, agreement, fell_back}.
let chunks = [];
let prompt = "";
let stopper = null;
let asked = 0; // Which pool was asked for last.

const at = (id) => document.getElementById(id);
const TEMPERATURES = [1, 0.7, 0.5, 0.3, 0];

function say(text, isWrong = false) {
  at("state").textContent = text;
  at("state").className = isWrong ? "wrong" : "";
}

function headers() {
  const key = at("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

// The events of a stream; an error object in it is thrown.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    const lines = waiting.split("\n\n");
    waiting = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function asking(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    throw new Error(answer.error ? answer.error.message : `the server answered ${response.status}`);
  }
  return response;
}

function show(chunk, text) {
  const number = chunks.push(chunk) - 1;
  // A real button would not break across lines, as text does.
  const button = document.createElement("span");
  button.setAttribute("role", "button");
  button.tabIndex = 0;
  button.textContent = text;
  button.title = `${chunk.num_draws} draws, ${(100 * chunk.agreement).toFixed(1)}% agreed`;
  if (chunk.fell_back) button.className = "spent";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => open(number, button));
  button.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    open(number, button);
  });
  at("text").append(button);
}

async function write(event) {
  event.preventDefault();
  if (stopper) return;
  prompt = at("prompt").value;
  chunks = [];
  at("chunk").hidden = true;
  at("text").replaceChildren();
  const before = document.createElement("span");
  before.className = "prompt";
  before.textContent = prompt;
  at("text").append(before);
  const body = {
    model: at("model").textContent, prompt, stream: true, return_chunks: true,
    temperature: Number(at("temperature").value),
    max_draws: Number(at("draws").value), num_draws: Number(at("draws").value),
    max_tokens: Number(at("tokens").value),
  };
  if (at("sampler").value !== "") body.sampler = at("sampler").value;
  if (at("seed").value !== "") body.seed = Number(at("seed").value);
  stopper = new AbortController();
  at("write").disabled = true;
  at("stop").disabled = false;
  const begin = performance.now();
  let reason = "";
  try {
    say("writing");
    const response = await asking("/v1/completions", body, stopper.signal);
    for await (const part of events(response)) {
      const choice = part.choices[0];
      for (const chunk of choice.chunks) show(chunk, choice.text);
      reason = choice.finish_reason || reason;
    }
    const seconds = (performance.now() - begin) / 1000;
    const draws = chunks.reduce((sum, chunk) => sum + chunk.num_draws, 0);
    const why = reason === "stop" ? "ended by itself" : "as many tokens as allowed";
    say(`${chunks.length} chunks, ${draws} draws, ${seconds.toFixed(1)} s; ${why}`);
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  } finally {
    stopper = null;
    at("write").disabled = false;
    at("stop").disabled = true;
  }
}

function tokensOf(tokens) {
  return tokens.map((token) => {
    const box = document.createElement("span");
    box.className = "token";
    box.textContent = token.replace(/\n/g, "⏎");
    return box;
  });
}

async function open(number, button) {
  const chunk = chunks[number];
  for (const other of at("text").querySelectorAll("[role=button]")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", "true");
  at("chunk").hidden = false;
  at("chunk-title").textContent = `Chunk ${number + 1}`;
  at("chunk-tokens").replaceChildren(...tokensOf(chunk.tokens));
  const spent = chunk.fell_back ? "; the draws were spent, and the commonest ones decided" : "";
  at("chunk-facts").textContent =
    `${chunk.num_draws} draws, of which ${(100 * chunk.agreement).toFixed(1)}% were this chunk${spent}.`;
  at("pool").replaceChildren();
  at("pool-facts").textContent = "drawing what else could have come";
  const mine = ++asked;
  const written = chunks.slice(0, number).flatMap((before) => before.token_ids);
  const chosen = Number(at("temperature").value);
  const temperatures = [...new Set([...TEMPERATURES, chosen])].sort((a, b) => b - a);
  try {
    const response = await asking("/v1/calm/pool", {
      model: at("model").textContent, prompt, written, num_draws: Number(at("draws").value), temperatures, seed: 0,
    });
    const pool = await response.json();
    if (mine === asked) showPool(pool, chunk, chosen);
  } catch (error) {
    if (mine === asked) at("pool-facts").textContent = error.message;
  }
}

function showPool(pool, chunk, chosen) {
  at("pool-facts").textContent =
    `${pool.num_draws} fresh draws gave ${pool.num_different} different chunks. Share of the draws, and the chance of ` +
    "each chunk by the pool rule at several temperatures:";
  const head = document.createElement("tr");
  for (const name of ["candidate", "draws", "", ...pool.temperatures.map((t) => `T = ${t}`)]) {
    const cell = document.createElement("th");
    cell.textContent = name;
    head.append(cell);
  }
  const rows = pool.candidates.map((candidate) => {
    const row = document.createElement("tr");
    if (chunk.token_ids.every((token, place) => token === candidate.token_ids[place])) row.className = "chosen";
    const text = document.createElement("td");
    text.textContent = candidate.tokens.join("").replace(/\n/g, "⏎");
    const count = document.createElement("td");
    count.textContent = candidate.count;
    const bar = document.createElement("td");
    const meter = document.createElement("meter");
    meter.max = pool.candidates[0].count;
    meter.value = candidate.count;
    bar.append(meter);
    row.append(text, count, bar);
    candidate.chances.forEach((chance, place) => {
      const cell = document.createElement("td");
      cell.textContent = `${(100 * chance).toFixed(1)}%`;
      if (pool.temperatures[place] === chosen) cell.className = "at-chosen";
      row.append(cell);
    });
    return row;
  });
  at("pool").replaceChildren(head, ...rows);
}

async function begin() {
  const about = await (await fetch("/page")).json();
  at("model").textContent = about.model;
  at("key-label").hidden = !about.needs_key;
  at("temperature").value = about.temperature;
  at("draws").max = about.max_draws;
  at("shown-temperature").textContent = at("temperature").value;
}

at("temperature").addEventListener("input", () => {
  at("shown-temperature").textContent = at("temperature").value;
});
at("form").addEventListener("submit", write);
at("stop").addEventListener("click", () => stopper && stopper.abort());
begin().catch((error) => say(error.message, true));
