(() => {
  const form = document.querySelector(".filters"), list = document.querySelector(".slices");
  const cards = [...list.children], status = form.querySelector("output");
  const fits = (card) => card.textContent.toLowerCase().includes(form.text.value.toLowerCase())
    && ["plane", "modality", "status", "captioner"].every((name) =>
      !form[name] || !form[name].value || form[name].value === card.dataset[name]);
  const filter = () => {
    let shown = 0;
    for (const card of cards) shown += !(card.hidden = !fits(card));
    status.textContent = `${shown} of ${cards.length} slices`;
  };
  const sort = () => {
    const sign = Number(form.sort.value);
    const key = (card) => card.dataset.similarity ? sign * card.dataset.similarity : 2;
    list.append(...(sign ? [...cards].sort((a, b) => key(a) - key(b)) : cards));
  };
  const update = () => { sort(); filter(); };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
})();
