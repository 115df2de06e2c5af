"use strict";
// Keeps the page fresh: fetches it again and swaps what has changed. Without it the page refreshes itself.
(() => {
  const PERIOD = 5000;
  const PATIENCE = 10000;
  const note = document.getElementById("note");
  let timer = 0;
  let busy = false;

  if (document.body.dataset.refresh !== "on") return;

  // Which details the server has opened: what differs from it was done by the reader, and stays.
  let opened = defaults(document);

  function defaults(root) {
    const all = root.querySelectorAll("main details[id]");
    return new Map(Array.from(all, (one) => [one.id, one.open]));
  }

  function selecting() {
    const selection = getSelection();
    return selection !== null && !selection.isCollapsed;
  }

  // Where the focus is, in words that hold for the next page too.
  function focused(main) {
    const active = document.activeElement;
    if (active === null || !main.contains(active)) return null;
    if (active.id !== "") return "#" + CSS.escape(active.id);
    const parent = active.parentElement;
    return active.localName === "summary" && parent.id !== "" ? "#" + CSS.escape(parent.id) + " > summary" : null;
  }

  function swap(next) {
    const main = document.querySelector("main");
    const fresh = next.querySelector("main");
    const focus = focused(main);
    const scrolled = Array.from(main.querySelectorAll(".scroll[id]"), (one) => [one.id, one.scrollLeft, one.scrollTop]);
    const [x, y] = [scrollX, scrollY];

    const now = defaults(next);
    for (const one of main.querySelectorAll("details[id]")) {
      const same = next.getElementById(one.id);
      if (same !== null && one.open !== opened.get(one.id)) same.open = one.open;
    }
    opened = now;

    main.replaceWith(document.adoptNode(fresh));
    for (const [id, left, top] of scrolled) document.getElementById(id)?.scrollTo(left, top);
    if (focus !== null) document.querySelector(focus)?.focus({ preventScroll: true });
    scrollTo(x, y);

    document.title = next.title;
    document.getElementById("about").replaceWith(document.adoptNode(next.getElementById("about")));
    headline(next);
  }

  // It is read out when it changes, but not because time goes by.
  function headline(next) {
    const [old, fresh] = [document.getElementById("state"), next.getElementById("state")];
    const [age, later] = [old.querySelector("#age"), fresh.querySelector("#age")];
    const text = later === null ? "" : later.textContent;
    if (age !== null) age.textContent = text;
    if (old.innerHTML !== fresh.innerHTML || old.className !== fresh.className) {
      old.className = fresh.className;
      old.replaceChildren(...Array.from(fresh.childNodes, (node) => document.adoptNode(node)));
    }
  }

  async function load() {
    const url = location.origin + location.pathname + location.search;
    const response = await fetch(url, {
      headers: { Accept: "text/html" },
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (!response.ok) throw new Error("nginx answered " + response.status);
    const next = new DOMParser().parseFromString(await response.text(), "text/html");
    if (next.querySelector("main + footer") === null) throw new Error("the answer was not complete");
    return next;
  }

  async function refresh() {
    clearTimeout(timer);
    if (busy) return;
    if (document.hidden || selecting()) return plan(PERIOD);
    busy = true;
    const begun = performance.now();
    try {
      const next = await load();
      // Something may have been selected meanwhile.
      if (!selecting()) swap(next);
      note.hidden = true;
    } catch (error) {
      const shown = document.getElementById("now").textContent;
      note.textContent = "! The page cannot be refreshed (" + error.message + "): this is from " + shown + ".";
      note.hidden = false;
    }
    busy = false;
    // A page that takes long is asked for less often.
    plan(Math.max(PERIOD, 10 * (performance.now() - begun)));
  }

  function plan(delay) {
    clearTimeout(timer);
    timer = setTimeout(refresh, delay);
  }

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) refresh();
  });
  plan(PERIOD);
})();
