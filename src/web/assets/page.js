// Keeps the sections of a page up to date. The page is complete without this script.
"use strict";

const connection = document.getElementById("connection");

// Puts new content into a section, and keeps the focus and what is unfolded.
function update(section, html) {
  const inside = section.contains(document.activeElement) ? document.activeElement : null;
  const address = inside && inside.getAttribute("href");
  const copied = inside && inside.dataset.copies;
  const summary = inside && inside.tagName === "SUMMARY" && inside.parentElement.id;
  const unfolded = Array.from(section.querySelectorAll("details[open]"), (details) => details.id);
  section.innerHTML = html;
  for (const id of unfolded) {
    const details = document.getElementById(id);
    if (details) details.open = true;
  }
  addCopyButtons(section);
  if (address) focusFirst(section, "a", (link) => link.getAttribute("href") === address);
  if (copied) focusFirst(section, "button", (button) => button.dataset.copies === copied);
  if (summary) focusFirst(section, "summary", (found) => found.parentElement.id === summary);
}

function focusFirst(section, selector, fits) {
  const found = Array.from(section.querySelectorAll(selector)).find(fits);
  if (found) found.focus({ preventScroll: true });
}

function isBeingSelected(section) {
  const selection = document.getSelection();
  return selection && !selection.isCollapsed && selection.containsNode(section, true);
}

// Sections that wait until the reader no longer selects text in them.
const waiting = new Map();

function show(section, html) {
  if (isBeingSelected(section)) {
    waiting.set(section, html);
    return;
  }
  waiting.delete(section);
  update(section, html);
}

document.addEventListener("selectionchange", () => {
  for (const [section, html] of waiting) show(section, html);
});

function report(text) {
  if (connection.textContent !== text) connection.textContent = text;
}

function now() {
  return new Date().toISOString().slice(11, 19) + " UTC";
}

let lost = null;

function isConnected() {
  lost = null;
  report("");
}

function isLost() {
  lost = lost || now();
  report(`No connection to the server of this page since ${lost}. What is shown is from before. Trying again.`);
}

function follow(address) {
  const events = new EventSource(address);
  for (const section of document.querySelectorAll("[data-live]")) {
    events.addEventListener(section.id, (event) => show(section, event.data));
  }
  events.addEventListener("open", isConnected);
  events.addEventListener("error", () => {
    isLost();
    // The browser tries again by itself, except after an answer that is not a stream of events.
    if (events.readyState === EventSource.CLOSED) setTimeout(() => follow(address), 5000);
  });
  const liveness = document.getElementById("liveness");
  if (liveness) liveness.textContent = "Later changes appear by themselves.";
}

// What `refresh` has shown last, by the id of the section.
const loaded = new Map();

// Loads the page again, and takes its sections.
async function refresh(seconds) {
  let after = seconds;
  try {
    const answer = document.hidden ? null : await fetch(location.href, { cache: "no-store" });
    if (answer && answer.ok) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const section of document.querySelectorAll("[data-live]")) {
        const later = page.getElementById(section.id);
        if (later && loaded.get(section.id) !== later.innerHTML) {
          loaded.set(section.id, later.innerHTML);
          show(section, later.innerHTML);
        }
      }
      after = Number(page.body.dataset.refresh);
      isConnected();
    } else if (answer) {
      isLost();
    }
  } catch {
    isLost();
  }
  if (after) setTimeout(() => refresh(after), after * 1000);
}

function addCopyButtons(within) {
  for (const code of within.querySelectorAll(".command code")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.dataset.copies = code.textContent;
    button.setAttribute("aria-label", `Copy the command ${code.textContent}`);
    button.addEventListener("click", () => copy(code, button));
    code.after(" ", button);
  }
}

async function copy(code, button) {
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // Browsers allow it only for pages from this host and over TLS.
    document.getSelection().selectAllChildren(code);
    done = "Selected: copy it with Ctrl+C";
  }
  button.textContent = done;
  report(done);
}

addCopyButtons(document);
if (document.body.dataset.events) follow(document.body.dataset.events);
if (document.body.dataset.refresh) refresh(Number(document.body.dataset.refresh));
