// Requests with the token of this tab. Where one is wanted, the form #token asks for it, once for all requests that wait.
let token = sessionStorage.getItem("token"), given = null;
function askForToken() {
  const form = document.getElementById("token");
  form.hidden = false;
  form.token.focus();
  given = given || new Promise(resolve => {
    form.onsubmit = event => {
      event.preventDefault();
      token = form.token.value;
      sessionStorage.setItem("token", token);
      form.hidden = true;
      given = null;
      resolve();
    };
  });
  return given;
}
async function ask(path, options = {}) {
  const sent = token;
  const headers = {...options.headers, ...(sent ? {Authorization: `Bearer ${sent}`} : {})};
  const answer = await fetch(path, {...options, headers});
  if (answer.status !== 401) return answer;
  if (sent === token) await askForToken();
  return ask(path, options);
}
