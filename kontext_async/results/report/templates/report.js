
"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return; // an empty folder

  const fold = (text) => text.normalize("NFKC").toLowerCase();
  const none = document.getElementById("none");
  const sheet = document.getElementById("sheet");
  const cards = Array.from(sheet.children, (node) => ({ node, ...node.dataset }));

  // Gathered at the first search, not while the page opens.
  const textOf = (card) => {
    card.text ??= fold(Array.from(card.node.querySelectorAll("[data-find]"), (part) => part.textContent).join("\n"));
    return card.text;
  };
  const partOf = (card, part) => card.node.querySelector(part)?.textContent ?? "";
  const shownCards = () => sorted.filter((card) => !card.node.hidden);

  let sorted = cards;
  let order = "";
  const sort = (by) => {
    if (by === order) return;
    order = by;
    const [, sign, field] = /^(-?)(.*)$/.exec(by);
    const value = (card) => (sign ? -1 : 1) * card[field];
    // Tasks without the value come last, in either direction.
    sorted = field ? cards.toSorted((a, b) => (a[field] === undefined) - (b[field] === undefined) || value(a) - value(b) || 0) : cards;
    sheet.append(...sorted.map((card) => card.node));
  };

  const apply = () => {
    const { search, state, shown, sort: by } = form.elements;
    const words = fold(search.value).split(/\s+/).filter(Boolean);
    let count = 0;
    sort(by.value);
    for (const card of cards) {
      const fits = (!state.value || card.state === state.value) && words.every((word) => textOf(card).includes(word));
      card.node.hidden = !fits;
      count += fits;
    }
    shown.value = `${count.toLocaleString("en")} of ${cards.length.toLocaleString("en")} tasks`;
    none.hidden = count > 0;
  };

  const show = (text) => {
    form.reset();
    form.elements.search.value = text;
    apply();
    form.elements.search.focus();
    document.getElementById("tasks").scrollIntoView();
  };

  const copy = async (button, text) => {
    await navigator.clipboard.writeText(text);
    const before = button.innerHTML;
    if (before === "Copied") return;
    button.textContent = "Copied";
    setTimeout(() => { button.innerHTML = before; }, 1500);
  };

  // A spreadsheet would run a cell that begins like a formula.
  const cell = (text) => `"${text.replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
  const rowOf = (card) => [
    partOf(card, ".id"),
    card.state,
    partOf(card, ".prompt[data-find]"),
    partOf(card, ".model"),
    card.seconds ?? "",
    partOf(card, ".file"),
    partOf(card, ".error"),
  ];
  const save = () => {
    // `kontext wait --from` finds the ids by the first column's name.
    const rows = [["id", "state", "prompt", "model", "seconds", "file", "error"], ...shownCards().map(rowOf)];
    const text = rows.map((row) => row.map(cell).join(",")).join("\r\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff", text, "\r\n"], { type: "text/csv" }));
    link.download = "tasks.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("reset").addEventListener("click", () => show(""));
  for (const button of document.querySelectorAll(".show")) {
    button.hidden = false;
    button.addEventListener("click", () => show(button.dataset.search));
  }
  document.getElementById("export").addEventListener("click", save);
  const copyIds = document.getElementById("copy");
  if (navigator.clipboard) {
    copyIds.addEventListener("click", () => copy(copyIds, shownCards().map((card) => partOf(card, ".id")).join("\n")));
    sheet.addEventListener("click", ({ target }) => {
      const button = target.closest(".copy");
      if (button) copy(button, button.closest("dd").querySelector(".id").textContent);
    });
    for (const button of sheet.querySelectorAll(".copy")) button.hidden = false;
  } else {
    copyIds.hidden = true;
  }
  form.hidden = false;
  apply();
  addEventListener("pageshow", apply); // back from an image, with the fields as they were
})();
