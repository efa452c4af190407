"use strict";
// Figures and the trajectory browser of a Millrace report. Texts of the run reach the page as text nodes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // --- figures ---------------------------------------------------------------------------------------------------

  const coarse = window.matchMedia("(pointer: coarse)").matches;

  function axis(given) {
    const theme = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
    const title = { ...given.title, font: { size: 12 }, standoff: 8 };
    return { ...theme, ...given, title };
  }

  function layoutOf(figure) {
    const layout = { xaxis: {}, yaxis: {}, ...figure.layout };
    const themed = {
      ...layout,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--text"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 48, r: 12, t: 8, b: 40 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", ...layout.legend },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
      dragmode: coarse ? false : "zoom",
    };
    for (const name of Object.keys(layout)) if (/^[xy]axis\d*$/.test(name)) themed[name] = axis(layout[name]);
    return themed;
  }

  const drawn = new Set();
  const options = { responsive: true, displayModeBar: false };

  function draw(place) {
    const name = place.dataset.figure;
    if (drawn.has(name)) return;
    drawn.add(name);
    const figure = data.figures[name];
    Plotly.newPlot(place, figure.data, layoutOf(figure), options);
  }

  function redraw() {
    for (const name of drawn) Plotly.relayout(byId("f-" + name), layoutOf(data.figures[name]));
  }

  // One at a time, so that the page answers in between.
  function drawAll(places) {
    const [next, ...rest] = places;
    if (next === undefined) {
      document.documentElement.dataset.ready = String(Math.round(performance.now()));
      return;
    }
    draw(next);
    setTimeout(drawAll, 0, rest);
  }

  const places = [...document.querySelectorAll("[data-figure]")];
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  // Paper is white: the class brings the light colours before the browser switches to its print styles.
  function printing(begins) {
    document.documentElement.classList.toggle("printing", begins);
    if (begins) places.forEach(draw);
    redraw();
  }
  window.addEventListener("beforeprint", () => printing(true));
  window.addEventListener("afterprint", () => printing(false));

  // --- trajectory browser ----------------------------------------------------------------------------------------

  const items = data.trajectories;
  const KINDS = ["context", "trained", "masked: too old", "sampled, not trained"];
  const state = { shown: [], chosen: null, mode: "kind" };

  const searchable = items.map((item) =>
    [item.id, item.episode, item.group, item.task, item.domain, ...item.turns.map((turn) => turn.text.join(""))]
      .join("\n")
      .toLowerCase()
  );

  function fill(id, values) {
    for (const value of [...new Set(values)].filter(Boolean).sort()) byId(id).append(new Option(value, value));
  }

  function stepOf(item) {
    if (item.step !== null) return item.step;
    const evaluation = /^eval (\d+)$/.exec(item.source);
    return evaluation ? Number(evaluation[1]) : null;
  }

  function rewardClass(reward) {
    if (reward === null) return "missing";
    return reward >= 1 - 1e-6 ? "success" : reward > 0 ? "part" : "none";
  }

  function takes(item, index) {
    const value = (id) => byId("filter-" + id).value;
    const text = value("text").trim().toLowerCase();
    const step = stepOf(item);
    const status = item.dropped ? "dropped: " + item.dropped : item.status;
    return (
      (!text || searchable[index].includes(text)) &&
      (!value("why") || item.why.split(", ").includes(value("why"))) &&
      (!value("domain") || item.domain === value("domain")) &&
      (!value("status") || status === value("status")) &&
      (!value("reward") || rewardClass(item.reward) === value("reward")) &&
      (!value("from") || (step !== null && step >= Number(value("from")))) &&
      (!value("to") || (step !== null && step <= Number(value("to"))))
    );
  }

  function fate(item) {
    if (item.source !== "train") return item.source.replace("eval", "evaluation at step");
    if (item.dropped) return "dropped: " + item.dropped;
    return item.step === null ? "not trained yet" : "trained at version " + item.step;
  }

  const rewardText = (reward) => (reward === null ? "no reward" : "reward " + Number(reward.toFixed(3)));

  function list() {
    state.shown = items.map((_, index) => index).filter((index) => takes(items[index], index));
    const rows = state.shown.map((index) => {
      const item = items[index];
      const head = element("div", { class: "item-head" }, element("span", {}, item.id), element("span", {}, rewardText(item.reward)));
      const sub = element("div", { class: "item-sub" }, [item.domain || item.task, fate(item), item.sampled + " tokens", item.why].join(" · "));
      const row = element("div", { class: "item", role: "option", id: "item-" + index, "aria-selected": "false" }, head, sub);
      row.addEventListener("click", () => choose(index));
      return row;
    });
    byId("list").replaceChildren(...rows);
    byId("count").textContent = `${state.shown.length} of ${items.length} trajectories`;
    if (!state.shown.includes(state.chosen)) state.chosen = state.shown.length ? state.shown[0] : null;
    choose(state.chosen, false);
  }

  function choose(index, scroll = true) {
    for (const row of byId("list").children) row.setAttribute("aria-selected", String(row.id === "item-" + index));
    state.chosen = index;
    if (index === null) {
      byId("list").removeAttribute("aria-activedescendant");
      byId("detail").replaceChildren(element("p", { class: "empty" }, "No trajectory matches; clear a filter."));
      return;
    }
    byId("list").setAttribute("aria-activedescendant", "item-" + index);
    // Only the list scrolls, never the page.
    const row = byId("item-" + index);
    const box = byId("list");
    if (scroll && row.offsetTop < box.scrollTop + box.offsetTop) box.scrollTop = row.offsetTop - box.offsetTop;
    const below = row.offsetTop + row.offsetHeight - box.offsetTop - box.clientHeight;
    if (scroll && below > box.scrollTop) box.scrollTop = below;
    show(items[index]);
  }

  function onKey(event) {
    const at = state.shown.indexOf(state.chosen);
    const last = state.shown.length - 1;
    const page = 10;
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: last };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    choose(state.shown[Math.min(last, Math.max(0, moves[event.key]))]);
  }

  function fact(name, value) {
    return element("div", {}, element("dt", {}, name), element("dd", {}, value));
  }

  function show(item) {
    const facts = [
      fact("task", item.task),
      fact("domain", item.domain ? `${item.domain}, difficulty ${item.difficulty}` : "-"),
      fact("reward", item.reward === null ? "none" : String(Number(item.reward.toFixed(4)))),
      fact("status", item.status + (item.error ? ": " + item.error : "")),
      fact("fate", fate(item) + (item.lag === null ? "" : `, lag up to ${item.lag}`)),
      fact("tokens", `${item.length}, ${item.sampled} sampled` + (item.cut ? `, ${item.cut} in the middle left out` : "")),
    ];
    if (Object.keys(item.parts).length) {
      facts.push(fact("parts", Object.entries(item.parts).map(([name, value]) => `${name} ${value}`).join(", ")));
    }
    if (Object.keys(item.timings).length) {
      facts.push(fact("seconds", Object.entries(item.timings).map(([name, value]) => `${name} ${value}`).join(", ")));
    }
    facts.push(fact("shown as", item.why));
    byId("detail").replaceChildren(
      element("h3", {}, item.id),
      element("dl", {}, ...facts),
      modes(item),
      key(item),
      element("div", { class: "turns by-" + state.mode, tabindex: "0", role: "region", "aria-label": "Turns" }, ...item.turns.map((turn) => turnOf(item, turn)))
    );
  }

  function modes(item) {
    const names = { kind: "what was trained", lag: "lag", logprob: "log-probability" };
    const box = element("fieldset", { class: "modes" }, element("legend", {}, "Colour tokens by"));
    for (const [mode, name] of Object.entries(names)) {
      const input = element("input", { type: "radio", name: "mode", value: mode, id: "mode-" + mode });
      input.checked = state.mode === mode;
      input.addEventListener("change", () => {
        state.mode = mode;
        show(item);
        byId("mode-" + mode).focus();
      });
      box.append(element("label", {}, input, " " + name));
    }
    return box;
  }

  // From green (fresh, likely) to red (old, unlikely).
  function shade(share) {
    const hue = 130 * (1 - Math.min(1, Math.max(0, share)));
    return `background: hsl(${hue.toFixed(0)} 65% 50% / 0.35)`;
  }

  const lagOf = (item, version) => (item.step === null ? null : item.step - version);

  function key(item) {
    const box = element("p", { class: "key by-" + state.mode });
    if (state.mode === "kind") {
      const used = new Set(item.turns.flatMap((turn) => turn.runs.map((run) => run[0])));
      for (const kind of [...used].sort()) box.append(element("span", { class: "k" + kind }, KINDS[kind]));
    } else if (state.mode === "lag") {
      const bound = data.max_lag;
      const lags = item.turns.flatMap((turn) => turn.runs.filter((run) => run[0]).map((run) => lagOf(item, run[1])));
      const known = [...new Set(lags)].filter((lag) => lag !== null).sort((a, b) => a - b);
      for (const lag of known) box.append(element("span", { class: "shade", style: shade(lag / Math.max(1, bound ?? 1)) }, "lag " + lag));
      if (!known.length) box.append("No lag: it was not trained.");
    } else {
      for (const value of [0, -1, -2, -4]) {
        box.append(element("span", { class: "shade", style: shade(-value / 4) }, value === -4 ? "-4 or less" : String(value)));
      }
    }
    return box;
  }

  function turnOf(item, turn) {
    const seconds = turn.seconds === null ? "" : ` · ${turn.seconds.toFixed(3)} s`;
    const head = element("div", { class: "turn-head" }, turn.role + seconds + ` · ${turn.text.length + turn.cut} tokens`);
    const body = element("div", { class: "tokens" });
    let at = 0;
    let sampled = 0;
    for (const [kind, version, count] of turn.runs) {
      for (let i = 0; i < count; i++, at++) {
        if (kind === 0) {
          body.append(element("span", { class: "k0" }, turn.text[at]));
          continue;
        }
        const logprob = turn.logprobs[sampled++];
        const lag = lagOf(item, version);
        const title = `${KINDS[kind]} · version ${version}${lag === null ? "" : ` · lag ${lag}`} · log-probability ${logprob}`;
        const token = element("span", { class: "k" + kind, title }, turn.text[at]);
        if (state.mode === "lag" && lag !== null) token.setAttribute("style", shade(lag / Math.max(1, data.max_lag ?? 1)));
        if (state.mode === "logprob") token.setAttribute("style", shade(-logprob / 4));
        body.append(token);
      }
    }
    if (turn.cut) body.append(element("span", { class: "k0" }, ` … ${turn.cut} tokens of this turn are left out …`));
    return element("div", { class: "turn " + (turn.role === "observation" ? "observation" : "") }, head, body);
  }

  function openEpisode(episode) {
    const index = items.findIndex((item) => item.episode === episode);
    if (index < 0) return;
    byId("filters").reset();
    list();
    choose(index);
    byId("list").focus({ preventScroll: true });
  }

  if (items.length) {
    fill("filter-why", items.flatMap((item) => item.why.split(", ")));
    fill("filter-domain", items.map((item) => item.domain));
    fill("filter-status", items.map((item) => (item.dropped ? "dropped: " + item.dropped : item.status)));
    byId("filters").addEventListener("input", list);
    byId("filters").addEventListener("reset", () => setTimeout(list, 0));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("list").addEventListener("keydown", onKey);
    for (const link of document.querySelectorAll("[data-open]")) {
      link.addEventListener("click", () => openEpisode(link.dataset.open));
    }
    list();
  }
  drawAll(places);
})();
