/* What JupyterLab's page does for the kit's controls and pictures, and ipywidgets and JupyterLab leave undone:

   - keys pressed in an explorer stay there: JupyterLab takes a letter or an arrow on a button or a closed menu for a
     shortcut, and two of them delete the cell (ipywidgets issue 3912);
   - a slider's handle has a name, and its value is read aloud as it is shown, not as 0.15000000000000002;
   - the description that a stored picture carries (`alt` in its metadata) reaches the picture;
   - the controls of a kernel that is gone say so.

   A federated extension written by hand: `get` hands out the plugin, no package of JupyterLab's is imported. To do
   without it: `jupyter labextension disable nbkit`. */

const EXPLORER = ".nbkit-explorer";
const CONTROL = ".widget-slider, .widget-toggle-buttons";
const GONE = "nbkit-kernel-gone";
const NOTICE = "No kernel answers these controls any more: run the cell again.";
const STYLE = `
  .${GONE} ${EXPLORER}::before, ${EXPLORER}.jupyter-widgets-disconnected::before {
    content: "${NOTICE}"; order: -1; font: var(--jp-ui-font-size1, 13px) var(--jp-ui-font-family, sans-serif);
    color: var(--jp-ui-font-color1, black); background: var(--jp-warn-color3, #fff3cd); padding: 4px 8px;
  }
  .${GONE} ${EXPLORER} > *, ${EXPLORER}.jupyter-widgets-disconnected > * { opacity: 0.5; }
  ${EXPLORER} .widget-toggle-buttons { display: flex; align-items: center; gap: 6px; }
  ${EXPLORER} .jupyter-widgets-disconnected::before { content: none; }
`;

/* Shift+Enter runs the cell, Escape leaves it, and what is pressed with Ctrl, Alt or Cmd is meant for the page. */
function isForThePage(event) {
  const { key, shiftKey } = event;
  return event.ctrlKey || event.metaKey || event.altKey || key === "Escape" || (shiftKey && key === "Enter");
}

function keepKeys(event) {
  const control = event.target;
  if (control instanceof Element && control.closest(EXPLORER)) {
    // on the control itself: its selectors are compared before those of what it lies in
    control.toggleAttribute("data-lm-suppress-shortcuts", !isForThePage(event));
  }
}

function put(element, attribute, value) {
  if (element.getAttribute(attribute) !== value) {
    element.setAttribute(attribute, value);
  }
}

function describe(control) {
  const label = control.querySelector(".widget-label")?.textContent.trim();
  const readout = control.querySelector(".widget-readout")?.textContent.trim();
  const handles = control.querySelectorAll(".noUi-handle");
  handles.forEach((handle, end) => {
    const name = handles.length > 1 ? `${label}, ${end ? "to" : "from"}` : label;
    const value = handles.length > 1 ? String(Number(Number(handle.ariaValueText).toPrecision(12))) : readout;
    label && put(handle, "aria-label", name);
    value && value !== "NaN" && put(handle, "aria-valuetext", value);
  });
  const buttons = control.querySelectorAll("button.widget-toggle-button");
  if (buttons.length) {
    put(control, "role", "group");
    label && put(control, "aria-label", label);
    buttons.forEach(button => put(button, "aria-pressed", String(button.classList.contains("mod-active"))));
  }
}

const described = new WeakSet();

function follow(control) {
  if (!described.has(control)) {
    described.add(control);
    const what = { childList: true, subtree: true, characterData: true, attributeFilter: ["aria-valuetext", "class"] };
    new MutationObserver(() => describe(control)).observe(control, what);
    describe(control);
  }
}

function followAll(root) {
  if (root instanceof Element) {
    root.matches(CONTROL) && follow(root);
    root.querySelectorAll(CONTROL).forEach(follow);
  }
}

/* JupyterLab's own renderer, and after it the description from the output's metadata. */
function describePictures(rendermime) {
  for (const mimeType of ["image/png", "image/jpeg"]) {
    const factory = rendermime.getFactory(mimeType);
    const createRenderer = options => {
      const renderer = factory.createRenderer(options);
      const renderModel = renderer.renderModel.bind(renderer);
      renderer.renderModel = async model => {
        await renderModel(model);
        const alt = model.metadata[mimeType]?.alt;
        const picture = renderer.node.querySelector("img");
        picture && alt && picture.setAttribute("alt", alt);
      };
      return renderer;
    };
    rendermime.addFactory({ ...factory, safe: true, mimeTypes: [mimeType], createRenderer }, rendermime.getRank?.(mimeType));
  }
}

function markWhenTheKernelGoes(panel) {
  const session = panel.sessionContext;
  const mark = () => {
    const kernel = session.session?.kernel;
    panel.node.classList.toggle(GONE, !kernel || ["dead", "terminating", "restarting"].includes(kernel.status));
  };
  session.kernelChanged.connect(mark);
  session.statusChanged.connect(mark);
}

const plugin = {
  id: "nbkit:page",
  description: "Names, keys and descriptions of the kit's controls and pictures.",
  autoStart: true,
  activate: app => {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    window.addEventListener("keydown", keepKeys, true);  // before JupyterLab, which listens on the document
    const added = records => records.forEach(record => record.addedNodes.forEach(followAll));
    new MutationObserver(added).observe(document.body, { childList: true, subtree: true });
    app.docRegistry.addWidgetExtension("Notebook", {
      createNew: panel => {
        describePictures(panel.content.rendermime);
        markWhenTheKernelGoes(panel);
      },
    });
  },
};

window._JUPYTERLAB = window._JUPYTERLAB || {};
window._JUPYTERLAB.nbkit = {
  init: () => {},
  get: () => Promise.resolve(() => ({ __esModule: true, default: plugin })),
};
