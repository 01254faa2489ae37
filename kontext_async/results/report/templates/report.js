
"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return; // an empty folder

  const fold = (text) => text.normalize("NFKC").toLowerCase();
  const none = document.getElementById("none");
  const cards = Array.from(document.getElementById("sheet").children, (node) => ({
    node,
    state: node.dataset.state,
  }));

  // Gathered at the first search, not while the page opens.
  const textOf = (card) => {
    card.text ??= fold(Array.from(card.node.querySelectorAll("[data-find]"), (part) => part.textContent).join("\n"));
    return card.text;
  };

  const apply = () => {
    const { search, state, shown } = form.elements;
    const words = fold(search.value).split(/\s+/).filter(Boolean);
    let count = 0;
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

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("reset").addEventListener("click", () => show(""));
  for (const button of document.querySelectorAll(".show")) {
    button.hidden = false;
    button.addEventListener("click", () => show(button.dataset.search));
  }
  form.hidden = false;
  apply();
})();
