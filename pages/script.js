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
      const {low, high, unit} = chart.svg.dataset;
      const step = Number(low) + share * (high - low);
      chart.cursor.setAttribute("d", `M${44 + share * 428} 12V176`);
      chart.at.textContent = `${unit} ${unit === "step" ? Math.round(step) : step.toPrecision(3)}`;
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

// Listening blind: each row has its own order of columns and letters for names until a choice in it.
for (const main of document.querySelectorAll("main.listen")) {
  const controls = main.querySelector(".blind-controls");
  const names = [...main.querySelectorAll("thead b")].map(b => b.textContent);
  const rows = [...main.querySelectorAll("tbody tr")].map(tr => ({
    tr, label: tr.querySelector("th").textContent,
    cells: [...tr.querySelectorAll("td")].map(td => ({
      td, who: td.querySelector(".who"), audio: td.querySelector("audio"), choose: add(td, "button"),
    })),
  }));
  const start = add(controls, "button"), tally = add(controls, "div");
  tally.setAttribute("role", "status");
  let blind = null;  // of each row: the columns in their order, and the chosen column
  try { blind = JSON.parse(localStorage.getItem(main.dataset.key)); }
  catch { /* a browser without memory for files: the choices last as long as the page */ }

  function add(parent, tag) {
    return parent.appendChild(document.createElement(tag));
  }
  function shuffled() {
    const order = names.map((_, i) => i);
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }
  function keep() {
    try { localStorage.setItem(main.dataset.key, JSON.stringify(blind)); } catch { /* as above */ }
    show();
  }
  function show() {
    main.classList.toggle("blind", Boolean(blind));
    start.textContent = blind ? "Show all names" : "Listen blind";
    rows.forEach(({label, cells}, r) => {
      cells.forEach(({who, audio, choose}, i) => {
        const {order, chosen} = blind ? blind[r] : {};
        const letter = blind ? String.fromCharCode(65 + order.indexOf(i)) : "";
        const isOpen = Boolean(blind) && chosen === null;
        who.textContent = isOpen ? letter : names[i];
        audio?.setAttribute("aria-label", `${label}, ${who.textContent}`);
        choose.hidden = !isOpen && (!blind || chosen !== i);
        choose.textContent = isOpen ? `Choose ${letter}` : "Your choice";
        choose.setAttribute("aria-label", `${choose.textContent}, ${label}`);
        choose.setAttribute("aria-pressed", String(!isOpen));
      });
    });
    const choices = blind ? blind.map(row => row.chosen).filter(chosen => chosen !== null) : [];
    tally.replaceChildren();
    if (blind) add(tally, "p").textContent = `${choices.length} of ${rows.length} chosen`;
    if (!choices.length) return;
    const list = add(tally, "ul");
    names.forEach((name, i) => {
      add(list, "li").textContent = `${name}: ${choices.filter(chosen => chosen === i).length}`;
    });
  }
  function arrange() {
    rows.forEach(({tr, cells}, r) => {
      tr.append(...(blind ? blind[r].order : names.map((_, i) => i)).map(i => cells[i].td));
    });
  }
  rows.forEach(({cells}, r) => cells.forEach(({audio, choose}, i) => {
    choose.onclick = () => {
      if (blind[r].chosen === null) { blind[r].chosen = i; keep(); }
    };
    audio?.addEventListener("play", () => {
      for (const other of main.querySelectorAll("audio")) if (other !== audio) other.pause();
    });
  }));
  start.onclick = () => {
    blind = blind ? null : rows.map(() => ({order: shuffled(), chosen: null}));
    arrange();
    keep();
  };
  arrange();
  show();
}
