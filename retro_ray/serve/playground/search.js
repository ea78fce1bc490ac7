// The search box: what the database holds that is near a text.

import { NeighbourCard, element, missingShardsNote } from "./neighbour.js";
import { fetchJson } from "./service.js";

const form = document.getElementById("finder");
const hits = document.getElementById("hits");
const status = document.getElementById("search-status");
const failure = document.getElementById("search-failure");

/** Make the search work; `continueText(text)` is called with a hit that is to become the prompt. */
export function startSearch(continueText) {
  let latest = 0; // an answer that comes after a later question is dropped
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const asked = ++latest;
    const query = form.elements.query.value;
    failure.hidden = true;
    status.textContent = "Searching\u2026";
    try {
      const body = { text: query, num_neighbours: Number(form.elements.count.value) };
      const { data } = await fetchJson("v1/retrieve", { body });
      if (asked !== latest) return;
      show(data[0], query, continueText);
    } catch (error) {
      if (asked !== latest) return;
      hits.replaceChildren();
      status.textContent = "";
      failure.textContent = error.message;
      failure.hidden = false;
    }
  });
}

function show({ neighbours, missing_shards: missingShards }, query, continueText) {
  const count = neighbours.length;
  status.textContent = count === 1 ? "1 chunk, nearest first." : `${count} chunks, nearest first.`;
  const missing = missingShardsNote(missingShards);
  if (missing) status.append(missing);
  hits.replaceChildren(
    ...neighbours.map((neighbour) => {
      const card = new NeighbourCard(neighbour);
      card.markShared(query, 1);
      const button = element("button", "quiet", "Use as prompt");
      button.type = "button";
      button.addEventListener("click", () => continueText(neighbour.text));
      card.element.append(button);
      return card.element;
    }),
  );
}
