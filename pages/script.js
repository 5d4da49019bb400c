// The script of a page: copy buttons, a cursor over the charts, playing below a spectrogram.
// 44, 428, 480, 12 and 176 come from the view box of pages/charts.py, 150 from spectrogram.py.
"use strict";

for (const code of document.querySelectorAll(".command code")) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  code.after(button);
  button.onclick = async () => {
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); }
    catch { document.execCommand("copy"); }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
}

// Moving over one chart moves the cursors of its group; the legend shows the points nearest by step.
const numbers = text => text ? text.split(" ").map(Number) : [];
for (const group of document.querySelectorAll(".charts")) {
  const charts = [...group.querySelectorAll("figure")].map(figure => {
    const paths = [...figure.querySelectorAll("path[data-x]")];
    const outputs = [...figure.querySelectorAll("output")];
    return {
      svg: figure.querySelector("svg"), at: figure.querySelector(".at"),
      cursor: figure.querySelector(".cursor"),
      series: paths.map((path, i) => ({
        x: numbers(path.dataset.x), v: path.dataset.v.split(" "),
        output: outputs[i], last: outputs[i].textContent,
      })),
    };
  });
  const point = share => {
    for (const chart of charts) {
      const {low, high} = chart.svg.dataset;
      const step = Number(low) + share * (high - low);
      chart.cursor.setAttribute("d", `M${44 + share * 428} 12V176`);
      chart.at.textContent = `step ${Math.round(step)}`;
      for (const s of chart.series) {
        let best = 0;
        s.x.forEach((x, i) => { if (Math.abs(x - step) < Math.abs(s.x[best] - step)) best = i; });
        s.output.textContent = s.v[best];
      }
    }
  };
  const leave = () => charts.forEach(chart => {
    chart.cursor.setAttribute("d", "");
    chart.at.textContent = "";
    chart.series.forEach(s => { s.output.textContent = s.last; });
  });
  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", event => {
      const box = chart.svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * 480;
      point(Math.min(1, Math.max(0, (x - 44) / 428)));
    });
    chart.svg.addEventListener("pointerleave", leave);
  }
}

// A playhead on the spectrogram shows the position of the sound; a click plays from there.
for (const sample of document.querySelectorAll(".sample")) {
  const audio = sample.querySelector("audio"), picture = sample.querySelector("svg");
  if (!audio) continue;
  const head = picture.querySelector(".playhead");
  audio.ontimeupdate = () => {
    head.setAttribute("d", `M${44 + audio.currentTime / audio.duration * 428} 0V150`);
  };
  picture.onclick = event => {
    const box = picture.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * 480 - 44) / 428;
    audio.currentTime = Math.min(1, Math.max(0, share)) * audio.duration;
    audio.play();
  };
}
