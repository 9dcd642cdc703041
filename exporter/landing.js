"use strict";
for (const button of document.querySelectorAll(".command button")) {
  const code = button.previousElementSibling;
  button.addEventListener("click", async () => {
    let label = "Copied";
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // Only secure contexts have a clipboard: select the text instead.
      getSelection().selectAllChildren(code);
      label = "Selected";
    }
    button.textContent = label;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
