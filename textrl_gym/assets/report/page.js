"use strict";
// The charts take the page's colours, light or dark, as all that is an agent's; samples are filtered. Nothing is fetched.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = read("chart-data"), palettes = read("palettes");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const narrow = () => innerWidth < 600;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faint = (hex, alpha) =>
    `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

  function paintTrace(trace) {
    const meta = trace.meta || {};
    if (meta.color !== undefined) {
      const color = palettes[dark.matches ? "dark" : "light"][meta.color];
      if (meta.fill) trace.fillcolor = faint(color, meta.fill);
      else if (trace.type === "bar")
        trace.marker = {
          color,
          pattern: { shape: ["", "/", "x"][meta.pattern], fillmode: "overlay", fgcolor: css("--card"), size: 7 },
        };
      else {
        trace.marker = { ...trace.marker, color, line: { color: css("--card"), width: 1 } };
        trace.line = { ...trace.line, color };
      }
    }
    return trace;
  }

  function height({ data, layout }) {
    const named = new Set(data.filter((trace) => trace.showlegend !== false).map((trace) => trace.legendgroup)).size;
    return layout.height + 22 * Math.floor(named / (narrow() ? 3 : 7)); // the legend's further lines
  }

  function paintLayout(layout, data) {
    layout.height = height({ data, layout });
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--soft") };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--ink") };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.margin = { l: narrow() ? 44 : 56, r: 12, t: narrow() ? 8 : 30, b: 44 };
    const below = { y: 0, yanchor: "bottom", yref: "container" };
    layout.legend = { orientation: "h", traceorder: "normal", x: 0, xanchor: "left", ...below };
    layout.hoverlabel = { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } };
    layout.dragmode = coarse.matches ? false : "zoom"; // a finger scrolls the page
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      const axis = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true };
      layout[name] = { ...axis, ...layout[name] };
      if (layout[name].title) Object.assign(layout[name].title, { font: { size: 13 }, standoff: 8 });
    }
    for (const shape of layout.shapes || []) shape.line.color = css("--soft");
    for (const note of layout.annotations || []) note.font = { color: css("--soft"), size: 12 };
    return layout;
  }

  const config = (key) => ({
    displaylogo: false,
    responsive: true,
    displayModeBar: coarse.matches || narrow() ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d"],
    toImageButtonOptions: { format: "svg", filename: key },
    showSendToCloud: false, // nothing leaves the page
    plotlyServerURL: "",
  });

  const place = (key) => document.getElementById(`chart-${key}`);
  const drawn = new Set();

  function draw(key) {
    if (!window.Plotly) {
      // Here and not before: reading a megabyte of script is no part of showing a text.
      const script = document.createElement("script");
      script.textContent = document.getElementById("plotly").textContent;
      document.head.append(script);
    }
    drawn.add(key);
    const { data, layout } = structuredClone(charts[key]);
    Plotly.react(place(key), data.map(paintTrace), paintLayout(layout, data), config(key));
  }

  function paint() {
    palettes[dark.matches ? "dark" : "light"].forEach((color, number) =>
      document.documentElement.style.setProperty(`--agent-${number}`, color));
    drawn.forEach(draw);
  }

  // A chart is drawn when it comes near the window: all of them at once keep a phone busy for seconds.
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(target.id.slice("chart-".length));
    }
  }, { rootMargin: "50%" });
  for (const [key, chart] of Object.entries(charts)) {
    place(key).style.minHeight = `${height(chart)}px`; // so that nothing moves when it is drawn
    near.observe(place(key));
  }
  addEventListener("beforeprint", () => Object.keys(charts).filter((key) => !drawn.has(key)).forEach(draw));
  paint();
  dark.addEventListener("change", paint);

  // -- samples ------------------------------------------------------------------------------------------------------

  const form = document.getElementById("filters");
  if (!form) return;
  const prompts = [...document.querySelectorAll("#samples .prompt")], status = document.getElementById("found");
  const words = (prompt) => [...prompt.querySelectorAll(".said")].map((said) => said.textContent.toLowerCase());
  const lower = new Map(prompts.map((prompt) => [prompt, words(prompt)])); // the prompt's, then each answer's

  function filter() {
    const text = form.elements.text.value.trim().toLowerCase(), number = form.elements.number.value;
    const agents = new Set([...form.querySelectorAll("[name=agent]:checked")].map((box) => box.value));
    let shown = 0;
    for (const prompt of prompts) {
      const answers = [...prompt.querySelectorAll(".answer")];
      for (const answer of answers) answer.hidden = !agents.has(answer.dataset.agent);
      const texts = lower.get(prompt);
      const there = answers.filter((answer) => !answer.hidden).map((answer) => texts[1 + answers.indexOf(answer)]);
      const right = !number || prompt.dataset.number === number;
      prompt.hidden = !(right && there.length && [texts[0], ...there].some((said) => said.includes(text)));
      shown += !prompt.hidden;
      if (text || number) prompt.open = true;
    }
    status.textContent = `${shown} of ${prompts.length} prompts shown`;
  }
  // Forty prompts are twenty screens of a phone.
  if (narrow()) for (const prompt of prompts) prompt.open = false;
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  filter();
})();
