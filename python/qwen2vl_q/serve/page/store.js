// Conversations, kept in this browser: IndexedDB, since pictures are large.

const NAME = "talks";

let opening;
function database() {
  opening ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("qwen2vl-q", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(NAME, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return opening;
}

async function run(mode, act) {
  const transaction = (await database()).transaction(NAME, mode);
  const asked = act(transaction.objectStore(NAME));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export const save = (talk) => run("readwrite", (store) => store.put(talk));
export const get = (id) => run("readonly", (store) => store.get(id));
export const remove = (id) => run("readwrite", (store) => store.delete(id));
/** All, the latest first. */
export const all = async () => (await run("readonly", (store) => store.getAll())).sort((a, b) => b.time - a.time);

export const newTalk = () => ({ id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", time: Date.now(), messages: [] });
