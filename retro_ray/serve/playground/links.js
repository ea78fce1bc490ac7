// Passages and their neighbours point at each other: under the pointer, with the focus, and by their numbers.

/**
 * In `root`, a passage under the pointer or with the focus is marked together with its neighbours, and the other way
 * round; their numbers lead from one to the other. `margin` is what the neighbours scroll in, where there is room.
 */
export function linkPassages(root, margin) {
  let pointed = null;
  let focused = null;
  const follow = (target) => {
    const passage = target?.closest?.("[data-passage]");
    const active = passage?.dataset.passage ?? focused;
    root.toggleAttribute("data-active", active !== null);
    for (const part of root.querySelectorAll("[data-passage]")) {
      part.classList.toggle("active", part.dataset.passage === active);
    }
    if (passage && !margin.contains(passage)) reveal(root.querySelector(`#neighbours-${active}`), margin);
    return passage?.dataset.passage ?? null;
  };
  root.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "touch") pointed = follow(event.target);
  });
  root.addEventListener("pointerleave", () => {
    pointed = follow(null);
  });
  root.addEventListener("focusin", (event) => {
    focused = null;
    focused = follow(event.target);
  });
  root.addEventListener("focusout", () => {
    focused = null;
    if (pointed === null) follow(null);
  });
  root.addEventListener("click", (event) => {
    const link = event.target.closest("a.number");
    const passage = event.target.closest(".passage[data-passage]");
    if (!link && !(passage && getSelection().isCollapsed)) return;
    event.preventDefault(); // not by the address: it holds the settings
    const target = root.querySelector(link ? link.getAttribute("href") : `#neighbours-${passage.dataset.passage}`);
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "nearest" });
  });
}

/** Scroll the margin to a lookup, if it is one that scrolls; never the page under the pointer. */
export function reveal(lookup, margin) {
  const distance = lookup.getBoundingClientRect().top - margin.getBoundingClientRect().top;
  const outside = distance < 0 || distance + Math.min(lookup.offsetHeight, 160) > margin.clientHeight;
  if (outside && getComputedStyle(margin).overflowY === "auto") margin.scrollTop += distance;
}
