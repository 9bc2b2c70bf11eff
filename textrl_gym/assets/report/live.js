"use strict";
// Of the served page only: how far the runs are, their curves, and the page anew when there is a newer one. What was
// chosen stays.
(() => {
  const box = document.getElementById("live"), memory = "textrl-gym-watch";
  const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const forms = () => [...document.forms], folds = () => [...document.querySelectorAll("details")];
  const isBox = (field) => field.type === "checkbox" || field.type === "radio";
  let reloading = false, drawn = "";

  // -- what a reload keeps --------------------------------------------------------------------------------------------

  const fields = () => forms().flatMap((form) => [...form.elements].filter((field) => field.name));
  const key = (field) => field.name + (isBox(field) ? field.closest("label").textContent : ""); // agents come and go

  function keep() {
    const values = Object.fromEntries(fields().map((field) => [key(field), isBox(field) ? field.checked : field.value]));
    const open = folds().map((fold) => fold.open);
    sessionStorage.setItem(memory, JSON.stringify({ values, open, top: scrollY }));
  }

  function restore() {
    const kept = JSON.parse(sessionStorage.getItem(memory));
    sessionStorage.removeItem(memory);
    if (!kept) return;
    for (const field of fields()) {
      if (!(key(field) in kept.values)) continue;
      if (isBox(field)) field.checked = kept.values[key(field)];
      else field.value = kept.values[key(field)];
    }
    for (const form of forms()) form.dispatchEvent(new Event("input"));
    if (kept.open.length === folds().length) folds().forEach((fold, place) => (fold.open = kept.open[place]));
    scrollTo(0, kept.top);
  }

  function busy() {
    const filtered = forms().some((form) =>
      [...form.elements].some((field) =>
        field.type === "checkbox" ? !field.checked : field.type === "search" || field.type === "number" ? field.value : 0
      )
    );
    const inside = document.activeElement?.closest("form, [tabindex], details:not(.prompt)");
    return filtered || inside || folds().some((fold) => fold.open && !fold.matches(".prompt")) || !getSelection().isCollapsed;
  }

  function reload() {
    if (reloading) return;
    reloading = true;
    keep();
    location.reload();
  }

  // -- progress -------------------------------------------------------------------------------------------------------

  function time(seconds) {
    if (seconds === null) return "";
    return seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
  }

  function row(run) {
    const made = document.createElement("tr"), head = make("th", run.run);
    head.scope = "row";
    const share = run.total ? `${Math.min(100, Math.floor((100 * run.done) / run.total))}%` : String(run.done);
    const tokens = run.done ? share : "";
    const numbers = [run.score, run.kl].map((x) => (x === null ? "" : x.toFixed(3)));
    made.append(head, ...[run.state, tokens, ...numbers, time(run.left)].map((text) => make("td", text)));
    return made;
  }

  function table(runs) {
    const made = document.createElement("table"), head = document.createElement("thead"), line = make("tr", "");
    const body = document.createElement("tbody"), wide = make("div", "");
    for (const name of ["run", "state", "tokens", "score", "KL, nats per sequence", "left"])
      line.append(Object.assign(make("th", name), { scope: "col" }));
    head.append(line);
    body.append(...runs.map(row));
    made.append(head, body);
    wide.className = "wide";
    wide.tabIndex = 0; // so that the arrow keys scroll it
    wide.role = "region";
    wide.ariaLabel = "Runs under way";
    wide.append(made);
    return wide;
  }

  async function draw(version) {
    if (version === drawn) return;
    const answer = await fetch(`/curves${location.search}`);
    if (!answer.ok) return;
    drawn = version;
    let place = document.getElementById("curves"); // a run's page has its own; of a comparison they stand below the table
    if (!place) {
      place = Object.assign(document.createElement("div"), { id: "curves" });
      box.after(place);
    }
    place.innerHTML = await answer.text(); // its texts are escaped, and a script that is set so does not run
  }

  function show({ version, curves, runs }) {
    const going = runs.filter((run) => run.state !== "done"), done = runs.length - going.length;
    const fresh = version !== box.dataset.version, parts = [];
    if (fresh && !busy()) return reload();
    if (runs.length) parts.push(make("p", `${done} of ${runs.length} runs have finished.`));
    if (fresh) {
      const button = make("button", "New results: reload");
      button.onclick = reload;
      parts.push(button);
    }
    if (going.length) parts.push(table(going));
    box.replaceChildren(...parts);
    return draw(curves);
  }

  async function ask() {
    try {
      const answer = await fetch(`/status${location.search}`);
      if (!answer.ok) throw new Error(answer.statusText);
      await show(await answer.json());
    } catch {
      box.replaceChildren(make("p", "The server does not answer. Asking again."));
    }
    if (!reloading) setTimeout(ask, 3000);
  }

  // Pages of tasks are asked for with the same token.
  for (const link of document.links) if (link.origin === location.origin && !link.hash) link.search = location.search;
  restore();
  ask();
})();
