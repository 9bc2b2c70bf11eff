"use strict";
// Tokens coloured by what each agent says of them: one prompt at a time, agents side by side on the same texts.
(() => {
  const data = JSON.parse(document.getElementById("credit-data").textContent);
  if (!data) return;
  const find = (id) => document.getElementById(`credit-${id}`);
  const form = find("form"), texts = find("texts"), readout = find("readout"), legend = find("legend");
  const names = Object.keys(data.scales), prompts = [...new Set(data.texts.map((text) => text.prompt))];
  const chosen = () => form.elements.quantity.value;
  const make = (tag, className, text) => Object.assign(document.createElement(tag), { className, textContent: text });
  const word = (name) => data.words[name][0];

  function short(x) {
    if (x === null || x === undefined) return "-";
    return Math.abs(x) >= 1e4 || (x && Math.abs(x) < 1e-3) ? x.toExponential(1) : String(Number(x.toPrecision(3)));
  }

  // -- colours --------------------------------------------------------------------------------------------------------

  function background(name, x) {
    if (x === null || x === undefined) return "";
    const { middle, high } = data.scales[name];
    const far = ((name === "ratio" ? Math.log(x) : x) - middle) / (high - middle);
    const share = Math.round(100 * Math.min(Math.abs(far), 1));
    return `color-mix(in srgb, var(--${far < 0 ? "minus" : "plus"}) ${share}%, var(--card))`;
  }

  function paint() {
    const name = chosen(), { low, middle, high } = data.scales[name];
    for (const token of texts.querySelectorAll(".token")) {
      const x = numbers(token)[name]?.[token.dataset.place];
      token.style.background = background(name, x);
      token.title = `${word(name)} ${short(x)}`;
      token.setAttribute("aria-label", `${token.textContent.trim() || "space"}: ${token.title}`);
    }
    for (const card of texts.querySelectorAll(".answer")) {
      const lacks = !(name in data.agents[card.dataset.agent].numbers);
      card.querySelector(".lacks").textContent = lacks ? data.absent[name] : "";
    }
    const shown = name === "ratio" ? Math.exp : (x) => x;
    const [from, to] = [low < middle ? `${short(shown(low))} or less` : short(low), `${short(shown(high))} or more`];
    const ends = low < middle ? [from, short(shown(middle)), to] : [from, "", to];
    legend.querySelectorAll(".ends span").forEach((end, place) => (end.textContent = ends[place]));
    legend.querySelector(".ramp").classList.toggle("half", low === middle);
    find("words").textContent = `${word(name)}: ${data.words[name][1]}.`;
  }

  // -- texts ----------------------------------------------------------------------------------------------------------

  const numbers = (token) => {
    const { agent, text } = token.closest(".tokens").dataset, { numbers } = data.agents[agent];
    return Object.fromEntries(Object.entries(numbers).map(([name, lines]) => [name, lines[text]]));
  };

  function visible(text, place) {
    const piece = text.tokens[place];
    if (piece) return piece.replaceAll("\n", "↵\n");
    return text.stop_reason === "EOS" && place === text.tokens.length - 1 ? "end" : "·"; // ·: a part of a character
  }

  function card(number, agent) {
    const text = data.texts[number], { name, color } = data.agents[agent];
    const made = make("div", "answer", ""), box = make("div", "said tokens", "");
    Object.assign(made.dataset, { agent });
    made.style.borderLeftColor = `var(--agent-${color})`;
    Object.assign(box.dataset, { agent, text: number });
    box.setAttribute("role", "listbox");
    box.setAttribute("aria-label", `Tokens, ${name}`);
    text.tokens.forEach((_, place) => {
      const token = make("span", text.tokens[place] ? "token" : "token mark", visible(text, place));
      token.dataset.place = place;
      token.tabIndex = place ? -1 : 0;
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", "false");
      box.append(token);
    });
    made.append(make("h4", "", name), box, make("p", "facts lacks", ""));
    return made;
  }

  function show() {
    const prompt = prompts[form.elements.prompt.value];
    const asked = make("details", "", ""), mean = (all) => all.reduce((a, b) => a + b, 0) / all.length;
    asked.append(make("summary", "", "The prompt"), make("div", "said small", prompt.trim()));
    const articles = data.texts.flatMap((text, number) => {
      if (text.prompt !== prompt) return [];
      const article = make("article", "prompt", ""), answers = make("div", "answers", "");
      const group = text.group_scores;
      const facts = `Score ${short(text.score)}; its group of ${group.length}: mean ${short(mean(group))}, from `;
      answers.append(...data.agents.map((_, agent) => card(number, agent)));
      const range = `${short(Math.min(...group))} to ${short(Math.max(...group))}`;
      const place = data.texts.slice(0, number + 1).filter((other) => other.prompt === prompt).length;
      article.append(make("h3", "", `Text ${place}`), make("p", "facts", facts + range), answers);
      return [article];
    });
    texts.replaceChildren(asked, ...articles);
    paint();
  }

  // -- one token --------------------------------------------------------------------------------------------------------

  function tell(token) {
    const { text, agent } = token.closest(".tokens").dataset, place = Number(token.dataset.place), name = chosen();
    for (const old of texts.querySelectorAll(".token[aria-selected=true], .token.same")) {
      old.classList.remove("same");
      old.setAttribute("aria-selected", "false");
    }
    for (const box of texts.querySelectorAll(`.tokens[data-text="${text}"]`)) box.children[place].classList.add("same");
    token.setAttribute("aria-selected", "true");
    const own = numbers(token);
    const said = names.filter((key) => key in own).map((key) => `${word(key)} ${short(own[key][place])}`);
    const others = data.agents.flatMap((other, number) =>
      number === Number(agent) || !(name in other.numbers) ? [] : `${other.name} ${short(other.numbers[name][text][place])}`
    );
    const head = `“${token.textContent}”, token ${place + 1} of ${data.texts[text].tokens.length}. `;
    readout.replaceChildren(make("b", "", head), `${data.agents[agent].name}: ${said.join(", ")}.`);
    if (others.length) readout.append(` ${word(name)} of the others: ${others.join(", ")}.`);
    readout.hidden = false;
  }

  function move(token, key) {
    const box = token.parentElement, all = [...texts.querySelectorAll(`.tokens[data-text="${box.dataset.text}"]`)];
    const row = all.indexOf(box), place = Number(token.dataset.place), last = box.children.length - 1;
    const to = { ArrowLeft: [row, place - 1], ArrowRight: [row, place + 1], Home: [row, 0], End: [row, last] };
    Object.assign(to, { ArrowUp: [row - 1, place], ArrowDown: [row + 1, place] });
    return to[key] && all[to[key][0]]?.children[to[key][1]];
  }

  const near = (event) => event.target.closest?.(".token");
  texts.addEventListener("focusin", (event) => {
    const token = near(event);
    if (!token) return;
    for (const other of token.parentElement.children) other.tabIndex = -1;
    token.tabIndex = 0;
    tell(token);
  });
  texts.addEventListener("pointerover", (event) => near(event) && tell(near(event)));
  texts.addEventListener("keydown", (event) => {
    const next = near(event) && move(near(event), event.key);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  form.addEventListener("input", (event) => {
    readout.hidden = true;
    if (event.target.name === "quantity") paint();
    else show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = legend.hidden = false;
  show();
})();
