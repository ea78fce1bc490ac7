// The page: tabs, theme, and the form that starts completions.

import { linkPassages, reveal } from "./links.js";
import { ResultView } from "./result.js";
import { startSearch } from "./search.js";
import { ServiceError, fetchJson, streamCompletion, useApiKey } from "./service.js";
import { fillFromAddress, keepInAddress, requestOf } from "./settings.js";

const byId = (id) => document.getElementById(id);
const form = byId("composer");
const results = byId("results");
const margin = byId("margin");
let running = null; // the AbortController of what is being written

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => showTab(tab.id));
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const next = tabs[(i + (event.key === "ArrowRight" ? 1 : tabs.length - 1)) % tabs.length];
      showTab(next.id);
      next.focus();
    });
  }
}

function showTab(id) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === id;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
}

function startTheme() {
  const button = byId("theme");
  const root = document.documentElement;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
  button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    button.setAttribute("aria-pressed", String(isDark()));
    try {
      localStorage.setItem("theme", root.dataset.theme);
    } catch {
      // Storage is turned off: the choice lasts as long as the page.
    }
  });
}

async function showServedModel() {
  try {
    const [model] = (await fetchJson("v1/models")).data;
    const database = model.database_version.slice(0, 8);
    byId("served").textContent = `${model.id} \u00b7 step ${model.checkpoint_step} \u00b7 database ${database}`;
    for (const length of document.querySelectorAll(".chunk-length")) length.textContent = model.chunk_length;
  } catch (error) {
    showFailure(error);
  }
}

function showFailure(error) {
  byId("failure").textContent = error.message;
  byId("failure").hidden = false;
  if (error.status === 401) askForKey();
}

function askForKey() {
  byId("more").open = true;
  byId("key").focus();
}

function setRunning(controller) {
  running = controller;
  const [shown, gone] = controller ? [byId("stop"), byId("start")] : [byId("start"), byId("stop")];
  shown.hidden = false;
  if (document.activeElement === gone) shown.focus(); // whoever pressed one of them has the other at hand
  gone.hidden = true;
}

async function write() {
  keepInAddress(form);
  byId("failure").hidden = true;
  const body = requestOf(form);
  const mode = new FormData(form).get("mode");
  const runs = [];
  if (mode !== "off") runs.push({ view: new ResultView("Retrieval on", body.prompt, showLookup), enabled: true });
  if (mode !== "on") runs.push({ view: new ResultView("Retrieval off", body.prompt), enabled: false });
  results.className = mode;
  results.replaceChildren(...runs.map((run) => run.view.element));
  margin.replaceChildren(mode === "off" ? "Retrieval is off: the model writes by itself." : runs[0].view.lookups);
  const controller = new AbortController();
  setRunning(controller);
  byId("status").textContent = "Writing\u2026";
  const ends = await Promise.all(
    runs.map(({ view, enabled }) => {
      const request = { ...body, retrieval: { enabled, ...(enabled ? body.retrieval : {}) } };
      return follow(view, request, controller.signal);
    }),
  );
  setRunning(null);
  byId("status").textContent = [...new Set(ends)].join(" ");
}

function showLookup(lookup, citation) {
  const count = citation.neighbours.length;
  const found = count === 1 ? "1 neighbour" : `${count} neighbours`;
  byId("status").textContent = `Writing passage ${lookup.dataset.passage} with ${found}\u2026`;
  if (!margin.matches(":hover, :focus-within")) reveal(lookup, margin);
}

/** Show a completion as it comes; returns how it ended, in words. */
async function follow(view, request, signal) {
  const started = performance.now();
  const summary = () => describe(view.completion, (performance.now() - started) / 1000, request.seed);
  try {
    for await (const chunk of streamCompletion(request, signal)) {
      view.take(chunk);
    }
  } catch (error) {
    if (error.name === "AbortError") {
      view.end(`Stopped. ${summary()}`);
      return "Stopped.";
    }
    if (!(error instanceof ServiceError)) console.error(error);
    view.end(summary(), error.message);
    if (error.status === 401) askForKey();
    return "Failed.";
  }
  view.end(summary());
  return "Finished.";
}

function describe(completion, seconds, seed) {
  const parts = [];
  if (completion.usage) parts.push(`${completion.usage.completion_tokens} tokens`);
  parts.push(`${seconds.toFixed(1)} s`);
  const lookups = completion.numLookups;
  if (lookups) parts.push(lookups === 1 ? "1 look-up" : `${lookups} look-ups`);
  parts.push(`seed ${seed}`);
  if (completion.finishReason === "stop") parts.push("came to an end");
  if (completion.finishReason === "length") parts.push("as long as asked");
  if (completion.finishReason === "cancelled") parts.push("cut short: the service is shutting down");
  return parts.join(" \u00b7 ");
}

function startWriting() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) write();
  });
  // What is wrong in a setting must be seen to be put right.
  form.addEventListener("invalid", (event) => byId("more").contains(event.target) && (byId("more").open = true), true);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("key").addEventListener("change", (event) => {
    useApiKey(event.target.value);
    byId("failure").hidden = true;
    showServedModel();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.contains(event.target)) form.requestSubmit();
  });
}

startTabs();
startTheme();
startWriting();
linkPassages(byId("write"), margin);
startSearch((text) => {
  form.elements.prompt.value = text;
  showTab("tab-write");
  form.elements.prompt.focus();
});
byId("to-search").addEventListener("click", () => {
  showTab("tab-search");
  byId("query").focus();
});
fillFromAddress(form);
showServedModel();
