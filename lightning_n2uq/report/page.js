"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("data").textContent).figures;
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const buttons = ["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"];
  const config = { displaylogo: false, responsive: true, modeBarButtons: [buttons] };

  const themed = (layout) => {
    const css = getComputedStyle(root);
    const value = (name) => css.getPropertyValue(name).trim();
    const axis = { gridcolor: value("--line"), zerolinecolor: value("--line"), automargin: true };
    const result = {
      margin: { l: 50, r: 15, t: 10, b: 40 },
      paper_bgcolor: value("--card"),
      plot_bgcolor: value("--card"),
      font: { color: value("--text") },
      legend: { orientation: "h", y: 1.12 },
      hovermode: "closest",
      ...layout,
    };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      result[key] = { ...axis, ...layout[key] };
    }
    return result;
  };

  const draw = (element) => {
    const figure = figures[element.dataset.figure];
    // Fresh copies: plotly writes into what it is given.
    const { data, layout } = JSON.parse(JSON.stringify(figure));
    Plotly.react(element, data, themed(layout), config);
    // The caption says it in words; of the plot itself a screen reader needs the buttons only.
    element.querySelectorAll("svg.main-svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
    element.dataset.drawn = root.dataset.theme;
  };

  // A plot is drawn when it comes near the window: a page with twenty layers opens at once.
  const nearby = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => {
      if (e.target.dataset.drawn !== root.dataset.theme) draw(e.target);
    }),
    { rootMargin: "600px" },
  );
  const plots = document.querySelectorAll(".plot");
  const look = () => plots.forEach((plot) => { nearby.unobserve(plot); nearby.observe(plot); });

  const setTheme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
    look();
  };
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  button.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
  preferred.addEventListener("change", (event) => setTheme(event.matches));
  addEventListener("beforeprint", () => plots.forEach((plot) => { if (plot.offsetParent) draw(plot); }));

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
