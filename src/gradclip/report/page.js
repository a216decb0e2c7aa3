"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = [];

function look(layout) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim();
  const line = style.getPropertyValue("--line").trim();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  const titled = (given) => given && { ...axis, ...given, title: { text: given.title || "" } };
  return {
    height: 320, margin: { l: 60, r: 12, t: 12, b: 48 }, hovermode: "closest",
    legend: { orientation: "h", y: -0.25 }, ...layout,
    xaxis: titled(layout.xaxis), yaxis: titled(layout.yaxis),
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink },
  };
}

function draw(id, figure) {
  const place = document.getElementById(id);
  if (!place || !figure) return;
  Plotly.newPlot(place, figure.data, look(figure.layout), { responsive: true, displaylogo: false });
  drawn.push([place, figure]);
}

function rateAbove(run, limit) {
  const norms = run.norms;
  let low = 0, high = norms.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (norms[middle] <= limit) low = middle + 1; else high = middle;
  }
  if (low === 0) return run.share;
  if (low === norms.length) return 0;
  const here = run.above[low - 1];
  // Below, norms between the two were left out, and are taken to lie evenly.
  if (low > run.whole) return here;
  const between = (limit - norms[low - 1]) / (norms[low] - norms[low - 1]);
  return here + between * (run.above[low] - here);
}

function connect(slider) {
  const i = slider.dataset.run, run = data.runs[i];
  const first = Math.log(run.norms[0] / 2);
  const last = Math.log(run.norms[run.norms.length - 1] * 1.1);
  const chosen = () => Number(Math.exp(first + (last - first) * slider.value / 1000).toPrecision(3));
  const show = (limit) => {
    const rate = rateAbove(run, limit);
    const told = `${limit} clips ${(100 * rate).toFixed(1)} % of the finite norms`;
    document.getElementById(`code-${i}`).textContent = `attach(optimizer, Norm(${limit}${run.order}))`;
    document.getElementById(`rate-${i}`).textContent = told;
    slider.setAttribute("aria-valuetext", told);
    mark(`curve-${i}`, limit);
  };
  slider.value = Math.round(1000 * (Math.log(run.limit) - first) / (last - first));
  slider.addEventListener("input", () => show(chosen()));
  show(run.limit);
}

function mark(id, limit) {
  const line = { type: "line", x0: limit, x1: limit, yref: "paper", y0: 0, y1: 1, line: { color: "#D55E00", width: 2, dash: "dot" } };
  Plotly.relayout(id, { shapes: [line] });
}

draw("norms", data.norms);
data.runs.forEach((run, i) => {
  draw(`curve-${i}`, run.curve);
  draw(`histogram-${i}`, run.histogram);
  draw(`heat-${i}`, run.heat);
});
document.querySelectorAll(".slider").forEach(connect);
dark.addEventListener("change", () => drawn.forEach(([place, figure]) => {
  const shapes = place.layout.shapes;
  Plotly.react(place, figure.data, { ...look(figure.layout), shapes });
}));
