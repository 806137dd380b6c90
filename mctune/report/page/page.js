// A page of results: plots that follow the filters, tables that sort, rows that can be taken along.
"use strict";
(() => {
  const { compare, turn } = sorting;
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = Object.keys(data.columns);
  const column = (name) => {
    const told = data.columns[name];
    return Array.isArray(told) ? told : told.at.map((place) => told.texts[place]);
  };
  const table = Object.fromEntries(names.map((name) => [name, column(name)]));
  const count = names.length ? table[names[0]].length : 0;
  const hide = document.getElementById("hide");
  const find = document.getElementById("find");

  // ---- plots -------------------------------------------------------------------------------------------------------
  const views = new Map();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = () => innerWidth < 640;

  function config() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const [ink, faint, line] = [of("--ink"), of("--faint"), of("--line")];
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis: { labelColor: faint, titleColor: faint, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11 },
      legend: { labelColor: ink, titleColor: faint, symbolStrokeWidth: 1.5 },
      header: { labelColor: ink, titleColor: faint },
      title: { color: ink },
      text: { color: ink, fontSize: 11 },
      rule: { color: ink },
      range: { category: dark.matches
        ? ["#56B4E9", "#E69F00", "#2bc79a", "#CC79A7", "#F0E442", "#ff8a4c", "#9aa4ff", "#c0c0c0"]
        : ["#0072B2", "#D55E00", "#00805d", "#AA4488", "#8a6d00", "#3b3b98", "#b5446e", "#5f6670"] },
    };
  }

  // What the plot has room for beside the labels of its axis, which are shorter on a narrow screen.
  const LABELS = { 330: 110, 150: 84, 400: 260 };
  function fitted(spec, room) {
    const told = JSON.stringify(spec).replace(/"(labelLimit|minExtent)":(\d+)/g, (all, name, size) =>
      narrow() && LABELS[size] ? `"${name}":${LABELS[size]}` : all);
    const labels = Math.max(60, ...[...told.matchAll(/"labelLimit":(\d+)/g)].map((found) => Number(found[1])).filter((size) => size < 340 && size !== 260));
    const width = Math.max(120, Math.min(860, room - labels - 100));
    return JSON.parse(told.replaceAll('"$width"', String(width))
      .replaceAll('"$columns"', String(Math.max(1, Math.floor(room / 215)))));
  }

  async function draw(figure, values) {
    const name = figure.dataset.chart;
    const spec = fitted(data.charts[name], figure.clientWidth);
    if (values !== undefined) spec.data.values = values;
    const size = JSON.stringify(spec).length;
    const old = views.get(name);
    const result = await embed(figure, spec, {
      ast: true,
      logLevel: 1,
      config: config(),
      renderer: size > 600000 ? "canvas" : "svg",
      actions: { export: true, source: false, compiled: false, editor: false },
      downloadFileName: `${data.name.replaceAll("/", "-")}-${name}`,
    });
    if (old) old.finalize();
    views.set(name, result);
    figure.dataset.drawn = "yes";
    if (data.charts[name].params) await result.view.signal("hide", hide.checked).runAsync();
  }

  // ---- the search --------------------------------------------------------------------------------------------------
  const choice = document.getElementById("study");

  function trialsOf(study) {
    let best = null;
    return study.kinds.map((kind, trial) => {
      const ms = study.ms[trial];
      if (ms !== null && (best === null || ms < best)) best = ms;
      const told = study.params.filter((param) => param.at[trial] !== null);
      const config = told.map((param) => `${param.name}=${param.values[param.at[trial]]}`).join(" ");
      return { trial, kind, ms, best, seconds: study.seconds[trial], config };
    });
  }

  function searchValues(name) {
    const study = data.studies[Number(choice.value)];
    const trials = trialsOf(study);
    if (name === "kinds") {
      const counts = new Map();
      for (const kind of study.kinds) counts.set(kind, (counts.get(kind) || 0) + 1);
      return [...counts].map(([kind, number]) => ({ kind, count: number }));
    }
    if (name === "importance") return study.importance.slice(0, 15).map(([param, share]) => ({ param, share }));
    if (name === "slice") {
      return study.params.slice(0, 24).flatMap((param) =>
        param.values.flatMap((value, place) =>
          trials.filter((one) => one.ms !== null && param.at[one.trial] === place)
            .map((one) => ({ param: param.name, value, ms: one.ms, trial: one.trial, kind: one.kind }))));
    }
    return trials;
  }

  const figures = [...document.querySelectorAll("figure.plot")];
  const valuesOf = (figure) => {
    const source = data.charts[figure.dataset.chart].data.name;
    return source === "rows" ? undefined : searchValues(source);
  };
  const show = (figure) => draw(figure, valuesOf(figure)).catch((error) => {
    figure.textContent = `This plot could not be drawn: ${error.message}`;
    console.error(error);
  });

  // Plots are drawn when they come near the screen, and all of them before the page is printed.
  const waiting = new Set(figures);
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && waiting.delete(entry.target)) show(entry.target);
  }, { rootMargin: "600px" });
  figures.forEach((figure) => seen.observe(figure));
  const all = () => Promise.all([...waiting].map((figure) => (waiting.delete(figure), show(figure))));
  const again = () => figures.filter((figure) => !waiting.has(figure)).forEach(show);
  addEventListener("beforeprint", all);
  dark.addEventListener("change", again);
  let width = innerWidth, timer = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(again, 200);
  });
  if (choice) {
    choice.addEventListener("change", () => figures
      .filter((figure) => !waiting.has(figure) && data.charts[figure.dataset.chart].data.name !== "rows").forEach(show));
  }

  // ---- all rows ----------------------------------------------------------------------------------------------------
  const shown = ["pass", "recurrence", "aggregation", "T", "H", "Dk", "segment_length", "inner_chunk", "top_k", "dtype",
    "backend", "how", "ms", "low", "high", "best_baseline", "speedup", "fraction_of_bound", "error", "date", "target", "config",
    "versions"].filter((name) => names.includes(name));
  const LINES = 100;
  const big = document.getElementById("all");
  const words = Array.from({ length: count }, (_, row) =>
    ["pass", "recurrence", "aggregation", "T", "backend", "how", "config", "dtype"].map((name) => table[name][row]).join(" ").toLowerCase());
  let order = Array.from({ length: count }, (_, row) => row);
  let kept = order, first = 0;

  function cell(name, row) {
    const value = table[name][row];
    const made = document.createElement("td");
    if (value === null || value === "") return made;
    made.textContent = typeof value !== "number" ? value : Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
    if (typeof value === "number") made.className = "number";
    if (made.textContent.length > 24) { made.className = "long"; made.title = made.textContent; }
    return made;
  }

  function fill() {
    const body = document.createElement("tbody");
    for (const row of kept.slice(first, first + LINES)) {
      const line = document.createElement("tr");
      line.className = table.how[row];
      line.append(...shown.map((name) => cell(name, row)));
      body.append(line);
    }
    if (big.tBodies[0]) big.tBodies[0].replaceWith(body); else big.append(body);
    const last = Math.min(first + LINES, kept.length);
    document.getElementById("place").textContent = kept.length ? `rows ${first + 1} to ${last} of ${kept.length}` : "no row";
    document.getElementById("before").disabled = first === 0;
    document.getElementById("after").disabled = last >= kept.length;
  }

  const head = document.createElement("thead").insertRow();
  for (const name of shown) {
    const made = document.createElement("th");
    made.scope = "col";
    const button = document.createElement("button");
    button.textContent = name.replaceAll("_", " ");
    button.addEventListener("click", () => {
      const sign = turn(made), values = table[name];
      const text = (value) => value === null ? "" : value;
      order.sort((a, b) => sign * compare(text(values[a]), text(values[b])));
      filter();
    });
    made.append(button);
    head.append(made);
  }
  big.append(head.parentElement);

  function filter() {
    const wanted = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    kept = order.filter((row) => !(hide.checked && table.how[row] === "predicted") && wanted.every((word) => words[row].includes(word)));
    first = 0;
    fill();
    document.getElementById("count").textContent = kept.length === count ? `${count} rows` : `${kept.length} of ${count} rows`;
    document.body.classList.toggle("measured-only", hide.checked);
    for (const line of document.querySelectorAll("#decisive tbody tr")) {
      const text = line.textContent.toLowerCase();
      line.hidden = !wanted.every((word) => text.includes(word));
    }
  }
  hide.addEventListener("change", () => {
    filter();
    for (const [name, result] of views) if (data.charts[name].params) result.view.signal("hide", hide.checked).runAsync();
  });
  find.addEventListener("input", filter);
  document.getElementById("before").addEventListener("click", () => { first = Math.max(0, first - LINES); fill(); });
  document.getElementById("after").addEventListener("click", () => { first += LINES; fill(); });

  // ---- downloads ---------------------------------------------------------------------------------------------------
  const quoted = (value) => value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
  const files = {
    csv: () => [new Blob([[names, ...Array.from({ length: count }, (_, row) => names.map((name) => table[name][row]))]
      .map((line) => line.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" })],
    json: () => [new Blob([JSON.stringify(Array.from({ length: count }, (_, row) =>
      Object.fromEntries(names.map((name) => [name, table[name][row]]))))], { type: "application/json" })],
    parquet: () => [new Blob([Uint8Array.from(atob(data.parquet), (one) => one.charCodeAt(0))], { type: "application/vnd.apache.parquet" })],
  };
  for (const button of document.querySelectorAll("button[data-as]")) {
    button.addEventListener("click", () => {
      const [blob] = files[button.dataset.as]();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${data.name.replaceAll("/", "-")}.${button.dataset.as}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  filter();
  document.documentElement.dataset.ready = "yes";
})();
