// The page: it asks what the model is, and brings its parts together.

import { fetchAbout } from "/page/api.js";
import { Chat } from "/page/chat.js";
import { Continue } from "/page/continue.js";
import { byId, showMessage } from "/page/dom.js";
import { Inspector } from "/page/inspector.js";
import { Settings } from "/page/settings.js";
import { chunkPhrase, describeModel } from "/page/words.js";

async function begin() {
  const about = await fetchAbout();
  byId("model").textContent = about.model;
  byId("facts").textContent = describeModel(about);
  byId("legend-text").textContent = `The model writes ${chunkPhrase(about)}. Each chunk is underlined in the text.`;
  byId("legend-spent").hidden = about.lowest_temperature < 1;
  const shortcut = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
  for (const key of document.querySelectorAll("kbd")) key.textContent = shortcut;

  const settings = new Settings(about);
  const inspector = new Inspector(about, settings);
  const modes = { continue: new Continue(about, settings, inspector), chat: new Chat(about, settings, inspector) };
  let mode = "continue";
  byId("modes").hidden = !about.has_chat;
  byId("modes").addEventListener("change", (event) => {
    mode = event.target.value;
    for (const name of Object.keys(modes)) byId(name).hidden = name !== mode;
    inspector.forget();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") inspector.close();
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    modes[mode].submit();
  });
}

begin().catch((error) => showMessage(document.querySelector("#continue .failure"), error.message));
