"use strict";
// The annotation page. Every text comes from the server as JSON and is shown as text; nothing is fetched from elsewhere.
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, kind) => Object.assign(document.createElement(tag), { textContent: text, className: kind ?? "" });
  const settings = JSON.parse($("settings").textContent);
  const memory = "textrl-gym-annotate", keysOff = `${memory}-keys-off`;
  const token = new URLSearchParams(location.search).get("token");
  let view = null; // what the server says is asked now
  let name = "", busy = false, pending = null, poll = 0;
  let groups = [], tieNext = false; // of a ranking: places of answers, best first
  let marks = [], marking = false, place = { answer: 0, from: 0, to: 0 }, differing = false;
  let seconds = 0, since = null; // looked at so far, and from when on

  // -- the server -----------------------------------------------------------------------------------------------------

  async function ask(path, body) {
    const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
    if (answer.ok) return answer.json();
    const error = new Error((await answer.text()).trim());
    error.code = answer.status;
    throw error;
  }

  // One request at a time. What could not be sent is kept, and sent again on request: it was not saved until then.
  async function send(path, body, said) {
    if (busy) return;
    clearTimeout(poll);
    busy = true;
    $("work").setAttribute("aria-busy", "true");
    try {
      const fresh = await ask(path, body);
      pending = null;
      $("problem").hidden = true;
      show(fresh, said);
    } catch (error) {
      if (error.code === 400 && path === "/answer") return refresh(error.message);
      pending = error.code === 400 ? null : [path, body, said];
      $("problem-words").textContent = pending
        ? `Not saved: ${error.code ? error.message : "the server does not answer"}.`
        : error.message;
      $("again").hidden = !pending;
      $("problem").hidden = false;
      (pending ? $("again") : name ? $("title") : $("name")).focus();
    } finally {
      busy = false;
      $("work").removeAttribute("aria-busy");
    }
  }

  function refresh(words) {
    busy = false;
    return send("/view", { annotator: name }, words);
  }

  const again = () => pending && send(...pending);

  // -- what is shown --------------------------------------------------------------------------------------------------

  function time(left) {
    if (left === null) return "";
    if (left < 90) return `about ${Math.max(1, Math.round(left))} s left`;
    if (left < 5400) return `about ${Math.round(left / 60)} min left`;
    return `about ${(left / 3600).toFixed(1)} h left`;
  }

  function show(fresh, said) {
    view = fresh;
    name = fresh.annotator;
    sessionStorage.setItem(memory, name);
    const { progress, phase, item } = fresh;
    for (const id of ["start", "work", "end"]) $(id).hidden = true;
    for (const id of ["state", "leave"]) $(id).hidden = false;
    $("count").textContent = `${name}: ${progress.yours} answered. All: ${progress.done} of ${progress.total}`;
    Object.assign($("done"), { max: Math.max(progress.total, 1), value: progress.done });
    $("left").textContent = time(progress.seconds_left);
    groups = [];
    tieNext = marking = differing = false;
    marks = [];
    since = null;
    $("comment").value = "";
    for (const radio of document.getElementsByName("confidence")) radio.checked = false;
    $("more").open = false;
    $("answers").replaceChildren();
    if (item) question(item, phase, progress);
    else end(phase);
    // The words of the status go last: a change while a part is hidden is not read out.
    $("notice").textContent = [said, fresh.feedback].filter(Boolean).join(" ");
  }

  function question(item, phase, progress) {
    $("work").hidden = false;
    const number = phase === "qualification" ? progress.qualified : progress.yours;
    $("title").textContent = phase === "qualification"
      ? `Qualification ${number + 1} of ${progress.qualification}`
      : `Question ${number + 1}`;
    document.title = $("title").textContent;
    const many = item.completions.length > 2;
    $("prompt").replaceChildren(...(typeof item.prompt === "string"
      ? [make("div", item.prompt.trim(), "text")]
      : item.prompt.map((turn) => {
          const box = make("div", "", "turn");
          box.append(make("span", turn.role), make("div", turn.content, "text"));
          return box;
        })));
    $("prompt").scrollTop = 0;
    $("answers").replaceChildren(...item.completions.map((text, index) => answerBox(index, many)));
    for (const part of document.querySelectorAll("dialog .two")) part.hidden = many;
    for (const part of document.querySelectorAll("dialog .many")) part.hidden = !many;
    $("submit").hidden = !many;
    $("bad-words").textContent = many ? "All bad" : "Both bad";
    $("undo").hidden = !view.undo;
    draw();
    seconds = 0;
    since = document.hidden ? null : performance.now();
    scrollTo(0, 0);
    $("title").focus({ preventScroll: true });
  }

  function answerBox(index, many) {
    const box = make("article", "", "answer"), head = make("h3", "", ""), choose = make("button", "", "");
    head.id = `answer-${index}`;
    head.append(make("span", `Answer ${index + 1}`), make("span", "", "rank"));
    box.setAttribute("aria-labelledby", head.id);
    const text = make("div", "", "text");
    text.dataset.answer = index;
    choose.type = "button";
    choose.append(many ? `Answer ${index + 1} is next` : `Answer ${index + 1} is better`, make("kbd", String(index + 1)));
    choose.onclick = () => pick(index);
    box.append(head, text, choose);
    return box;
  }

  function end(phase) {
    clearTimeout(poll);
    const words = {
      done: ["All questions are answered", "Thank you. You may close this page."],
      wait: ["Please wait", "The last questions are open at other annotators. This page looks again by itself."],
      failed: ["Thank you for your time", "Too few of the first questions were answered as known, so there are no more."],
    }[phase];
    $("end").hidden = false;
    $("end-title").textContent = document.title = words[0];
    $("end-words").textContent = words[1];
    $("end-undo").hidden = !view.undo;
    $("end-title").focus();
    if (phase === "wait") poll = setTimeout(() => send("/view", { annotator: name }), 5000);
  }

  const say = (words) => ($("notice").textContent = words);

  // -- choices --------------------------------------------------------------------------------------------------------

  const asked = () => Boolean(view?.item) && !$("work").hidden;
  const size = () => view.item.completions.length;
  const many = () => size() > 2;

  function pick(index) {
    if (!asked() || index >= size()) return;
    if (!many()) return save(index ? [2, 1] : [1, 2], `Saved: answer ${index + 1} is better.`);
    const where = groups.findIndex((group) => group.includes(index));
    if (where >= 0) {
      groups[where] = groups[where].filter((other) => other !== index);
      groups = groups.filter((group) => group.length);
      say(`Answer ${index + 1} has no rank.`);
    } else {
      if (tieNext && groups.length) groups.at(-1).push(index);
      else groups.push([index]);
      const left = size() - groups.flat().length;
      say(`Answer ${index + 1} has rank ${rankOf(index)}. ${left ? `${left} left.` : "Enter saves."}`);
    }
    tieNext = false;
    draw();
  }

  function rankOf(index) {
    const where = groups.findIndex((group) => group.includes(index));
    return where < 0 ? null : 1 + groups.slice(0, where).flat().length;
  }

  function tie() {
    if (!many()) return save(view.item.completions.map(() => 1), "Saved: a tie.");
    tieNext = groups.length > 0 && !tieNext;
    say(tieNext ? "The next answer ties with the one before." : groups.length ? "No tie." : "Rank an answer first.");
    draw();
  }

  function submit() {
    if (!many()) return;
    const ranks = view.item.completions.map((_, index) => rankOf(index));
    if (ranks.includes(null)) return say(`${ranks.filter((rank) => rank === null).length} answers have no rank yet.`);
    save(ranks, "Saved: your ranking.");
  }

  const points = (text, end) => [...text.slice(0, end)].length; // the server counts characters, JavaScript halves

  function save(ranks, said, allBad = false) {
    if (!asked() || pending) return;
    const { id, turn, completions } = view.item;
    const chosen = [...document.getElementsByName("confidence")].find((radio) => radio.checked);
    const spans = marks.map(({ answer, start, end, mark }) => ({
      completion: answer,
      start: points(completions[answer], start),
      end: points(completions[answer], end),
      mark,
    }));
    pause();
    send("/answer", {
      annotator: name, item: id, turn, ranks, all_bad: allBad, spans,
      confidence: chosen ? Number(chosen.value) : null,
      comment: $("comment").value.trim(),
      seconds: Math.round(seconds) / 1000,
    }, said);
  }

  const bad = () => save(view.item.completions.map(() => 1), "Saved: all are bad.", true);
  const skip = () => save(null, "Skipped.");
  const undo = () => view?.undo && !pending && send("/undo", { annotator: name }, "Taken back.");

  function pause() {
    if (since !== null) seconds += performance.now() - since;
    since = null;
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) pause();
    else if (asked()) since = performance.now();
  });

  // -- texts: marks and differences -----------------------------------------------------------------------------------

  const words = (text) => [...text.matchAll(/\S+/g)].map((match) => [match.index, match.index + match[0].length]);

  // The words of a text that are not in the longest sequence of words that it has in common with another.
  function different(text, other) {
    const own = words(text), a = own.map(([s, e]) => text.slice(s, e)), b = words(other).map(([s, e]) => other.slice(s, e));
    if (a.length * b.length > 4e6) return [];
    const width = b.length + 1, common = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        common[i * width + j] = a[i] === b[j]
          ? common[(i + 1) * width + j + 1] + 1
          : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    const ranges = [];
    for (let i = 0, j = 0; i < a.length; ) {
      if (j < b.length && a[i] === b[j]) { i++; j++; }
      else if (j < b.length && common[i * width + j + 1] > common[(i + 1) * width + j]) j++;
      else ranges.push(own[i++]);
    }
    return ranges;
  }

  function draw() {
    const texts = view.item.completions;
    for (const box of document.querySelectorAll("#answers .text")) {
      const index = Number(box.dataset.answer), text = texts[index], rank = many() ? rankOf(index) : null;
      const layers = marks.filter((mark) => mark.answer === index).map(({ start, end, mark }) => [start, end, mark]);
      if (differing) {
        const other = texts[index === 0 ? 1 : 0]; // each against the first, and the first against the second
        layers.push(...different(text, other).map(([start, end]) => [start, end, "differ"]));
      }
      if (marking && place.answer === index) {
        const all = words(text), low = Math.min(place.from, place.to), high = Math.max(place.from, place.to);
        if (all.length) layers.push([all[low][0], all[high][1], "cursor"]);
      }
      box.replaceChildren(...pieces(text, layers));
      box.parentElement.classList.toggle("ranked", rank !== null);
      box.parentElement.querySelector(".rank").textContent = rank === null ? "" : `rank ${rank}`;
      if (marking) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      const label = `Answer ${index + 1}, marking words`;
      for (const [key, value] of [["role", "group"], ["aria-label", label]])
        marking ? box.setAttribute(key, value) : box.removeAttribute(key);
    }
    $("marking").hidden = !marking;
    $("mark").setAttribute("aria-pressed", marking);
    $("differ").setAttribute("aria-pressed", differing);
    if (many()) $("tie").setAttribute("aria-pressed", tieNext);
    else $("tie").removeAttribute("aria-pressed");
  }

  // Blanks around a text are not shown: completions of language models begin with one.
  const lead = (text) => text.length - text.trimStart().length;

  function pieces(text, layers) {
    const cuts = [...new Set([lead(text), text.trimEnd().length, ...layers.flatMap(([start, end]) => [start, end])])].sort((a, b) => a - b);
    return cuts.slice(0, -1).map((start, number) => {
      const kinds = layers.filter(([from, to]) => from <= start && start < to).map(([, , kind]) => kind);
      const part = text.slice(start, cuts[number + 1]);
      return kinds.length ? make(kinds.every((kind) => kind === "cursor") ? "span" : "mark", part, kinds.join(" ")) : part;
    });
  }

  function differ() {
    differing = !differing;
    draw();
    say(differing ? "Words that differ are highlighted." : "Differences are no longer shown.");
  }

  function setMarking(on) {
    marking = on;
    place = { answer: 0, from: 0, to: 0 };
    draw();
    if (on) document.querySelector("#answers .text").focus();
    else $("title").focus({ preventScroll: true });
    say(on ? "Marking: arrow keys move by word, g marks as good, x as bad, Escape ends." : "");
  }

  // What is selected by mouse or touch, else the words of the cursor: [answer, start, end].
  function chosenPart() {
    const selection = getSelection();
    if (!selection.isCollapsed && selection.rangeCount) {
      const range = selection.getRangeAt(0), box = range.startContainer.parentElement?.closest("#answers .text");
      if (box && box.contains(range.endContainer)) {
        const before = document.createRange();
        before.setStart(box, 0);
        before.setEnd(range.startContainer, range.startOffset);
        const answer = Number(box.dataset.answer), start = lead(view.item.completions[answer]) + before.toString().length;
        return [answer, start, start + range.toString().length];
      }
    }
    const all = words(view.item.completions[place.answer]);
    if (!all.length) return null;
    return [place.answer, all[Math.min(place.from, place.to)][0], all[Math.max(place.from, place.to)][1]];
  }

  function setMark(mark) {
    const part = chosenPart();
    if (!part) return;
    const [answer, start, end] = part;
    // Of two marks on the same letters the newer counts.
    marks = marks.flatMap((old) => {
      if (old.answer !== answer || old.end <= start || end <= old.start) return [old];
      return [{ ...old, end: start }, { ...old, start: end }].filter((rest) => rest.start < rest.end);
    });
    if (mark) marks.push({ answer, start, end, mark });
    getSelection().removeAllRanges();
    draw();
    say(mark ? `Marked as ${mark}: ${view.item.completions[answer].slice(start, end)}` : "Mark removed.");
  }

  function markingKey(event) {
    const count = words(view.item.completions[place.answer]).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step) {
      place.to = Math.min(Math.max(place.to + step, 0), count - 1);
      if (!event.shiftKey) place.from = place.to;
      draw();
      const part = chosenPart();
      if (part) say(view.item.completions[part[0]].slice(part[1], part[2]));
    } else if (event.key === "g") setMark("good");
    else if (event.key === "x") setMark("bad");
    else if (event.key === "Delete" || event.key === "Backspace") setMark(null);
    else if (event.key === "Escape" || event.key === "m") setMarking(false);
    else return;
    event.preventDefault();
  }

  document.addEventListener("focusin", ({ target }) => {
    if (!marking || target.dataset?.answer === undefined) return;
    const answer = Number(target.dataset.answer);
    if (answer === place.answer) return;
    place = { answer, from: 0, to: 0 };
    draw();
  });

  // -- keys -----------------------------------------------------------------------------------------------------------

  const actions = {
    t: tie, b: bad, s: skip, u: undo, d: differ, m: () => setMarking(!marking),
    c: () => {
      $("more").open = true;
      document.querySelector("[name=confidence]").focus();
    },
    Enter: submit,
    Backspace: () => {
      if (many() && groups.length) pick(groups.at(-1).at(-1));
    },
    ArrowLeft: () => !many() && pick(0),
    ArrowRight: () => !many() && pick(1),
  };

  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.altKey || event.metaKey || $("help").open) return;
    const field = target.closest("input, textarea, select");
    if (field) {
      if (key === "Escape" && asked()) $("title").focus();
      return;
    }
    if (!$("keys").checked || event.repeat) return;
    if (key === "?") {
      event.preventDefault();
      return help();
    }
    if (pending) {
      if (key === "Enter" && target.tagName !== "BUTTON") again();
      return;
    }
    if (!asked()) {
      if (key === "u") undo();
      return;
    }
    if (marking) return markingKey(event);
    // Enter on a button or a summary is its own.
    if (key === "Enter" && target.closest("button, summary, a")) return;
    const action = /^[1-9]$/.test(key) ? () => pick(Number(key) - 1) : actions[key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  function help() {
    $("help").showModal();
    $("help-title").focus();
  }

  // -- the beginning --------------------------------------------------------------------------------------------------

  const clicks = {
    tie, bad, skip, undo, differ, submit, again, "end-undo": undo, "open-help": help,
    mark: () => setMarking(!marking), "mark-good": () => setMark("good"), "mark-bad": () => setMark("bad"),
    "mark-none": () => setMark(null), "mark-end": () => setMarking(false), "close-help": () => $("help").close(),
    leave: () => {
      sessionStorage.removeItem(memory);
      location.reload();
    },
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", () => action());
  // A click on a button of the marks would take the selection away before it is read.
  $("marking").addEventListener("mousedown", (event) => event.preventDefault());
  $("keys").checked = !localStorage.getItem(keysOff);
  $("keys").addEventListener("change", () =>
    $("keys").checked ? localStorage.removeItem(keysOff) : localStorage.setItem(keysOff, "1")
  );
  for (const id of ["instructions", "help-instructions"]) $(id).textContent = settings.instructions;
  if (settings.annotators.length) {
    $("names").append(...settings.annotators.map((one) => make("option", one)));
    Object.assign($("name"), { hidden: true, required: false });
    $("names").hidden = false;
    document.querySelector("label[for=name]").htmlFor = "names";
    $("names").removeAttribute("aria-label");
  }
  $("join").addEventListener("submit", (event) => {
    event.preventDefault();
    send("/view", { annotator: (settings.annotators.length ? $("names") : $("name")).value });
  });
  const before = sessionStorage.getItem(memory);
  if (before) send("/view", { annotator: before });
})();
