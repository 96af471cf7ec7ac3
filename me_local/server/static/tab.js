// What is known until this tab is closed: in the browser's storage, so that it outlasts a reload, or where the browser
// gives none, as long as the page. Knows nothing of what it is.

const here = new Map();

export function remember(key, value) {
  here.set(key, value);
  try {
    sessionStorage.setItem(key, value);
  } catch {
    // a reload forgets it
  }
}

export function recall(key) {
  try {
    return sessionStorage.getItem(key) ?? here.get(key) ?? null;
  } catch {
    return here.get(key) ?? null;
  }
}
