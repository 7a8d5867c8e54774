// The page: it asks what the model is, and brings its parts together.

import { describe } from "/page/api.js";
import { Chat } from "/page/chat.js";
import { Continue } from "/page/continue.js";
import { at, tell } from "/page/dom.js";
import { Inspector } from "/page/inspector.js";
import { Settings } from "/page/settings.js";
import { ofChunks, ofModel } from "/page/words.js";

async function begin() {
  const about = await describe();
  at("model").textContent = about.model;
  at("facts").textContent = ofModel(about);
  at("legend-text").textContent = `The model writes ${ofChunks(about)}. Each chunk is underlined in the text.`;
  at("legend-spent").hidden = about.lowest_temperature < 1;
  const shortcut = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
  for (const key of document.querySelectorAll("kbd")) key.textContent = shortcut;

  const settings = new Settings(about);
  const inspector = new Inspector(about, settings);
  const modes = { continue: new Continue(about, settings, inspector), chat: new Chat(about, settings, inspector) };
  let mode = "continue";
  at("modes").hidden = !about.has_chat;
  at("modes").addEventListener("change", (event) => {
    mode = event.target.value;
    for (const name of Object.keys(modes)) at(name).hidden = name !== mode;
    inspector.forget();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") inspector.close();
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    modes[mode].submit();
  });
}

begin().catch((error) => tell(document.querySelector("#continue .failure"), error.message));
