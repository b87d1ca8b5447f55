"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("data").textContent).figures;
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const buttons = ["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"];
  const hidden = new Set();

  // Opaque colours: plotly chooses the colour of a cell's number by what is behind it, here always dark grey, in
  // the dark always white. A scale through both would pass cells on which neither can be read.
  const scales = {
    light: [[0, "#f6f8fa"], [0.02, "#dbe8f5"], [1, "#8ab8e6"]],
    dark: [[0, "#1d2731"], [0.02, "#27435e"], [1, "#3874b5"]],
  };

  const themed = (layout, size) => {
    const css = getComputedStyle(root);
    const value = (name) => css.getPropertyValue(name).trim();
    const axis = { gridcolor: value("--line"), zerolinecolor: value("--line"), automargin: true };
    const result = {
      margin: { l: 50, r: 15, t: 28, b: 45 },
      paper_bgcolor: value("--card"),
      plot_bgcolor: value("--card"),
      font: { color: value("--text") },
      modebar: { color: value("--faint"), activecolor: value("--text"), bgcolor: "rgba(0,0,0,0)" },
      hovermode: "closest",
      showlegend: false,
      ...layout,
      ...size,
    };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      result[key] = { ...axis, ...layout[key] };
    }
    return result;
  };

  const draw = (element, printing = false) => {
    const figure = figures[element.dataset.figure];
    // Fresh copies: plotly writes into what it is given.
    const { data, layout } = JSON.parse(JSON.stringify(figure));
    for (const trace of data) {
      if (trace.colorscale === "theme") trace.colorscale = scales[root.dataset.theme];
      trace.visible = !hidden.has(trace.meta);
    }
    // On paper two plots stand side by side, and three rows fit on a page.
    const height = printing ? Math.min(layout.height ?? 220, 330) : layout.height ?? 340;
    element.style.height = `${height}px`;
    const config = { displaylogo: false, staticPlot: printing, modeBarButtons: [buttons] };
    Plotly.react(element, data, themed(layout, { width: element.clientWidth, height }), config);
    // The caption says it in words; of the plot itself a screen reader needs the buttons only.
    element.querySelectorAll("svg.main-svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
    element.dataset.drawn = state(element);
  };
  const state = (element) => [root.dataset.theme, element.clientWidth, ...hidden].join();

  // A plot is drawn when it comes near the window: a page with twenty layers opens at once.
  const nearby = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => {
      if (e.target.clientWidth && e.target.dataset.drawn !== state(e.target)) draw(e.target);
    }),
    { rootMargin: "600px" },
  );
  const plots = document.querySelectorAll(".plot");
  const look = () => plots.forEach((plot) => { nearby.unobserve(plot); nearby.observe(plot); });

  new ResizeObserver(look).observe(document.getElementById("content"));

  const setTheme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Switch to light theme" : "Switch to dark theme";
    look();
  };
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  button.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
  preferred.addEventListener("change", (event) => setTheme(event.matches));

  document.querySelectorAll("button.run").forEach((toggle) => toggle.addEventListener("click", () => {
    const run = Number(toggle.dataset.run);
    if (!hidden.delete(run)) hidden.add(run);
    toggle.setAttribute("aria-pressed", String(!hidden.has(run)));
    document.querySelectorAll("figure[data-run], figure li[data-run]").forEach((part) => {
      part.hidden = hidden.has(Number(part.dataset.run));
    });
    look();
  }));

  // On paper: light, every plot as wide as its column there, and back as it was afterwards.
  let dark = false;
  addEventListener("beforeprint", () => {
    dark = root.dataset.theme === "dark";
    root.dataset.theme = "light";
    root.classList.add("printing");
    plots.forEach((plot) => { if (plot.offsetParent) draw(plot, true); });
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    root.dataset.theme = dark ? "dark" : "light";
    plots.forEach((plot) => { if (plot.offsetParent) draw(plot); });
  });

  const select = document.getElementById("layer");
  if (select) {
    const show = () => document.querySelectorAll(".layer").forEach((group) => {
      group.hidden = group.dataset.layer !== select.value;
    });
    select.addEventListener("change", () => {
      show();
      document.querySelector("[role=status]").textContent = `Plots of ${select.value}`;
    });
    show();
  }
  setTheme(preferred.matches);
})();
