// Small helpers. Generated text becomes text nodes only, never HTML.

export const byId = (id) => document.getElementById(id);

// An element with properties and attributes (those with a dash, and role), and children.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Shows a sentence in an element, or hides the element if there is none.
export function showMessage(element, sentence = "") {
  element.textContent = sentence;
  element.hidden = sentence === "";
}

// For screen readers; the text itself is not announced chunk by chunk.
export function announce(sentence) {
  byId("announced").textContent = sentence;
}

export async function copy(text, button) {
  const label = button.textContent;
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyBySelection(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Copy failed";
  }
  announce(button.textContent);
  setTimeout(() => { button.textContent = label; }, 1500);
}

// Browsers offer the clipboard to https and localhost only.
function copyBySelection(text) {
  const area = make("textarea", { value: text, className: "unseen" });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const worked = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!worked) throw new Error("not copied");
}
