// Elements from a description of them, and as few changes to them as another description asks for.
//
// A description is { tag, name, attributes, text, grow, children, about }: `name` is the class, `text` stands for
// children, `grow` is the part of a row that the element fills, `about` is kept for who asks with `aboutOf`. All of a
// description but its texts comes from this program; elements are made by it one by one, so texts are only ever text.
// Knows nothing of what is described.

const about = new WeakMap();

/** What was said about the thing that an element shows. */
export const aboutOf = (element) => about.get(element);

/** An element that fits a description. */
export function make({ tag, name, attributes, text, grow, children, about: said }) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  for (const [key, value] of Object.entries(attributes ?? {})) element.setAttribute(key, value);
  if (grow !== undefined) element.style.flexGrow = grow;
  if (text !== undefined) element.textContent = text;
  else element.append(...(children ?? []).map(make));
  if (said) about.set(element, said);
  return element;
}

/** Bring the children of an element from one list of descriptions to another; the first `from` stay as they are. */
export function patch(parent, old, fresh, from = 0) {
  for (let index = from; index < fresh.length; index++) {
    const [before, after] = [old[index], fresh[index]];
    if (!before) parent.append(make(after));
    else if (!alike(before, after)) parent.childNodes[index].replaceWith(make(after));
    else if (after.children) patch(parent.childNodes[index], before.children, after.children);
  }
  while (parent.childNodes.length > fresh.length) parent.lastChild.remove();
}

/** Whether two descriptions differ in their children at most. */
function alike(before, after) {
  return (
    before.tag === after.tag &&
    before.name === after.name &&
    before.text === after.text &&
    before.grow === after.grow &&
    before.about === after.about &&
    JSON.stringify(before.attributes) === JSON.stringify(after.attributes)
  );
}
