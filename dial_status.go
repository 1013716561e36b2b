// Dialstatus reports what became of every call that Plivo forwards. It is Plivo's guide
// "Dial Status Reporting Using Go", made fit for real calls:
//
//	POST /dialstatus/        the answer URL. A call gets the XML that dials the configured
//	                         destinations; the end of a call gets an empty <Response>.
//	POST /dialstatus/action  the action URL of that <Dial>. What became of it is one record in
//	                         the log; the answer is the XML that carries the call on.
package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-martini/martini"
	"github.com/plivo/plivo-go/v7"
	"github.com/plivo/plivo-go/v7/xml"
)

func main() {
	debug.SetGCPercent(200) // with so small a heap, twice the requests between collections cost 4 MiB
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Getenv, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run serves until ctx is done, then lets the requests under way finish. It logs JSON lines to
// stdout. Its error says why it could not start, a line for each problem, or why it had to stop.
func run(ctx context.Context, getenv func(string) string, stdout io.Writer) error {
	cfg, err := configure(getenv)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.address)
	if err != nil {
		return fmt.Errorf("HOST and PORT: %w", err)
	}
	log := slog.New(slog.NewJSONHandler(stdout, nil))
	log.Info("listening", "address", listener.Addr().String())
	if getenv("DIAL_TO") == "" {
		log.Warn("DIAL_TO is not set: calls are forwarded to a number reserved for fiction", "number", fictionalNumber)
	}
	if cfg.authToken == "" {
		log.Warn("PLIVO_AUTH_TOKEN is not set: everybody may call, with PHLO_BASIC_AUTH or without")
	}
	server := &http.Server{
		Handler:           newApp(cfg, log),
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second, // header and body
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    28 << 10, // net/http adds 4 KiB: 32 in all
	}
	stopped := make(chan struct{})
	context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		server.Shutdown(grace) // what is not finished by then ends with the process
		close(stopped)
	})
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-stopped
	return nil
}

const (
	answerPath      = "/dialstatus" // Martini matches it with and without a slash at its end
	actionPath      = "/dialstatus/action"
	maxBody         = 64 << 10 // bytes; Plivo sends less than one KiB
	maxSigned       = 200      // fields; Plivo signs less than 50, and plivo-go's time grows with their square
	fictionalNumber = "+12025550123"
)

// config is what the environment says, checked. What it does not say is empty.
type config struct {
	address, callerID, publicURL, authToken, basicAuth string

	destinations []any // <Number> and <User>
	timeout      int   // seconds
}

var (
	e164    = regexp.MustCompile(`^\+?[1-9][0-9]{6,14}$`)
	sipURI  = regexp.MustCompile(`^sip:[!#-;=?A-~]+@[!#-;=?A-~]+$`) // printable, no " < > @
	baseURL = regexp.MustCompile(`^https?://([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?(/[A-Za-z0-9._~%/-]*)?$`)
	secret  = regexp.MustCompile(`(?s)^(PLIVO_AUTH_TOKEN|PHLO_BASIC_AUTH)=.|^PUBLIC_URL=.*@`)
)

// configure reads and checks the environment. Its error has a line for every problem: the
// variable, its value unless that may be a secret, and what is wanted.
func configure(getenv func(string) string) (cfg config, err error) {
	bad := func(variable, value, want string) {
		if secret.MatchString(variable + "=" + value) {
			value = "(not shown)"
		}
		err = errors.Join(err, fmt.Errorf("%s %q: want %s", variable, value, want))
	}
	read := func(variable string, valid func(string) bool, want string) string {
		value := getenv(variable)
		if value != "" && !valid(value) {
			bad(variable, value, want)
		}
		return value
	}
	cfg.address = net.JoinHostPort(getenv("HOST"), cmp.Or(read("PORT", isPort, "a port number, 0 to 65535"), "8080"))
	for destination := range strings.SplitSeq(cmp.Or(getenv("DIAL_TO"), fictionalNumber), ",") {
		destination = strings.TrimSpace(destination)
		escaped := html.EscapeString(destination) // plivo-go writes it raw
		switch {
		case e164.MatchString(destination):
			cfg.destinations = append(cfg.destinations, new(xml.NumberElement).SetContents(escaped))
		case sipURI.MatchString(destination):
			cfg.destinations = append(cfg.destinations, new(xml.UserElement).SetContents(escaped))
		default:
			bad("DIAL_TO", destination, "E.164 numbers ("+fictionalNumber+") and SIP URIs (sip:user@example.com), separated by commas")
		}
	}
	cfg.callerID = read("CALLER_ID", e164.MatchString, "an E.164 number ("+fictionalNumber+")")
	cfg.timeout, _ = strconv.Atoi(read("DIAL_TIMEOUT", regexp.MustCompile(`^[1-9][0-9]{0,8}$`).MatchString, "whole seconds, at least 1"))
	cfg.publicURL = strings.TrimRight(read("PUBLIC_URL", isBaseURL, "http or https, a host, perhaps a path, and nothing else"), "/")
	cfg.authToken = read("PLIVO_AUTH_TOKEN", regexp.MustCompile(`^\S+$`).MatchString, "the auth token as the Plivo console shows it")
	cfg.basicAuth = read("PHLO_BASIC_AUTH", regexp.MustCompile(`^[^:]+:.+$`).MatchString, "user:password")
	for _, variable := range []string{"DIAL_TO", "PLIVO_AUTH_TOKEN", "PUBLIC_URL"} {
		if getenv("MARTINI_ENV") == martini.Prod && getenv(variable) == "" {
			bad(variable, "", "a value when MARTINI_ENV is "+martini.Prod)
		}
	}
	return cfg, err
}

// isPort tells whether a text is a port number.
func isPort(text string) bool {
	_, err := strconv.ParseUint(text, 10, 16)
	return err == nil
}

// isBaseURL tells whether a text is http or https, a host, perhaps a path, and nothing else.
func isBaseURL(text string) bool {
	u, err := url.Parse(text)
	return err == nil && baseURL.MatchString(text) && isPort(cmp.Or(u.Port(), "0"))
}

// newApp is the Martini app: the two routes, 405 or 404 for the rest, and 500 for a panic. What
// every request needs stands around Martini, not in middleware, which costs reflection on each.
func newApp(cfg config, log *slog.Logger) http.Handler {
	routes := martini.NewRouter()
	routes.Post(actionPath, checked(cfg, log, action(log))) // first: Martini tries the patterns in turn
	routes.Post(answerPath, checked(cfg, log, answer(cfg, log)))
	routes.NotFound(func(w http.ResponseWriter, r *http.Request) {
		if allowed := strings.Join(routes.MethodsFor(r.URL.Path), ", "); allowed != "" {
			w.Header().Set("Allow", allowed)
			reject(w, r, log, http.StatusMethodNotAllowed, r.Method+" is not allowed here: send "+allowed)
		} else {
			reject(w, r, log, http.StatusNotFound, "not found: send to "+answerPath+"/ or "+actionPath+"/")
		}
	})
	app := martini.New()
	app.Action(routes.Handle)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if cause := recover(); cause != nil {
				log.Error("panic", "cause", fmt.Sprint(cause), "stack", string(debug.Stack()), "path", r.URL.Path)
				http.Error(w, "internal server error", http.StatusInternalServerError)
			}
		}()
		r.Body = http.MaxBytesReader(w, r.Body, maxBody) // closes the connection over a longer one
		app.ServeHTTP(w, r)
	})
}

// A handler answers a checked request. base is the URL by which Plivo reached this server.
type handler func(w http.ResponseWriter, r *http.Request, base string)

// answer is the answer URL. A call gets the <Dial>. The end of a call, which comes here where the
// application has no hangup URL (Plivo's "Application API"), gets an empty <Response>.
func answer(cfg config, log *slog.Logger) handler {
	over, publicDial := document(), dialDocument(cfg, cfg.publicURL)
	return func(w http.ResponseWriter, r *http.Request, base string) {
		if callIsOver[r.FormValue("CallStatus")] {
			reply(w, r, log, slog.LevelInfo, "hangup", hangupFields, over)
		} else if base == cfg.publicURL {
			reply(w, r, log, slog.LevelInfo, "call", callFields, publicDial)
		} else {
			reply(w, r, log, slog.LevelInfo, "call", callFields, dialDocument(cfg, base))
		}
	}
}

// action is the action URL: it reports what became of the <Dial> and answers with what follows.
// 400: there is no DialStatus.
func action(log *slog.Logger) handler {
	documents := make(map[string][]byte, len(followUps))
	for status, elements := range followUps {
		documents[status] = document(elements...)
	}
	return func(w http.ResponseWriter, r *http.Request, _ string) {
		status := r.FormValue("DialStatus")
		if status == "" {
			reject(w, r, log, http.StatusBadRequest, "DialStatus is missing: send the form that Plivo posts to a Dial's action URL")
			return
		}
		level, followUp := slog.LevelInfo, documents[status]
		if followUp == nil {
			level, followUp = slog.LevelWarn, documents[""]
		}
		reply(w, r, log, level, "dial", dialFields, followUp)
	}
}

var (
	hangup = new(xml.HangupElement)
	speak  = new(xml.SpeakElement).AddSpeak
	// followUps is what follows each DialStatus. Nobody is there to hear a sentence at the first two.
	followUps = map[string][]any{
		"completed": {hangup},
		"cancel":    {hangup},
		"busy":      {speak("The line is busy. Please try again later."), hangup},
		"no-answer": {speak("Nobody answered. Please try again later."), hangup},
		"timeout":   {speak("The call could not be connected in time. Please try again later."), hangup},
		"failed":    {speak("The call could not be connected."), hangup},
		"":          {speak("The call has ended."), hangup}, // any other
	}
	// callIsOver is each CallStatus that Plivo sends when a call is over.
	callIsOver = map[string]bool{"completed": true, "busy": true, "failed": true, "timeout": true, "no-answer": true, "cancel": true}
	// What is reported: Plivo's fields by their names, which are the log's keys.
	callFields   = []string{"CallUUID", "From", "To", "Direction", "CallStatus"}
	hangupFields = slices.Concat(callFields, []string{"HangupCause", "Duration"})
	dialFields   = []string{"DialStatus", "DialALegUUID", "DialBLegUUID", "DialRingStatus", "DialHangupCause", "CallUUID", "From", "To"}
)

// reply logs one record with these fields of the form, and then answers with the document.
func reply(w http.ResponseWriter, r *http.Request, log *slog.Logger, level slog.Level, message string, fields []string, document []byte) {
	report := make([]slog.Attr, 0, 8)
	for _, field := range fields {
		report = append(report, slog.String(field, r.FormValue(field)))
	}
	log.LogAttrs(r.Context(), level, message, report...)
	w.Header().Set("Content-Type", "application/xml")
	w.Write(document)
}

// dialDocument is the XML for a call. Its action is fully qualified, as Plivo's "Dial XML" asks.
func dialDocument(cfg config, base string) []byte {
	dial := new(xml.DialElement).SetContents(cfg.destinations).
		SetAction(base + actionPath + "/").SetMethod(http.MethodPost).SetRedirect(true)
	if cfg.callerID != "" {
		dial = dial.SetCallerID(cfg.callerID)
	}
	if cfg.timeout != 0 {
		dial = dial.SetTimeout(cfg.timeout)
	}
	return document(dial)
}

// document is the XML of a <Response> with these elements. Where plivo-go answers the text of an
// error in its place it panics: an element that can't be marshalled is a mistake in this program.
func document(elements ...any) []byte {
	response := xml.ResponseElement{Contents: elements}.String()
	if !strings.HasPrefix(response, "<Response>") {
		panic("plivo-go: " + response)
	}
	return []byte(response)
}

// reject answers a request that is not served with a plain line, which is the log's reason, too.
func reject(w http.ResponseWriter, r *http.Request, log *slog.Logger, status int, reason string, more ...any) {
	log.Warn("rejected", append([]any{"status", status, "reason", reason, "path", r.URL.Path}, more...)...)
	http.Error(w, reason, status)
}

// checked hands a handler the requests that read well and whose sender may call: everybody without
// an auth token, else who signs as Plivo or has PHLO's login. The others get 400 to 415.
func checked(cfg config, log *slog.Logger, next handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if status, reason := readForm(r); status != http.StatusOK {
			reject(w, r, log, status, reason)
			return
		}
		base := cfg.publicURL
		if base == "" {
			base = requestBase(r)
		}
		if base == "" {
			reject(w, r, log, http.StatusBadRequest, "bad Host or X-Forwarded-Host: send a host name or an address, perhaps with a port")
			return
		}
		if cfg.authToken != "" {
			called := base + r.URL.RequestURI()
			if !isSigned(r, called, cfg.authToken) && !hasLogin(r, cfg.basicAuth) {
				reject(w, r, log, http.StatusForbidden, "forbidden: only Plivo may call",
					"url", called, "hint", "if Plivo called another URL than this, set PUBLIC_URL")
				return
			}
		}
		next(w, r, base)
	}
}

// readForm parses body and query into r.Form. It answers 200, or the status and the reason of a
// rejection: 400 where they do not read or decode, 413 for a body too long, 415 for no form.
func readForm(r *http.Request) (status int, reason string) {
	body, err := io.ReadAll(r.Body)
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &tooLong):
		return http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is too long: send %d bytes at most", maxBody)
	case err != nil:
		return http.StatusBadRequest, "the body broke off or came too slowly: send all of it, at once"
	}
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch mediaType = strings.ToLower(strings.TrimSpace(mediaType)); {
	case mediaType == "application/x-www-form-urlencoded":
		r.PostForm, err = url.ParseQuery(string(body))
	case mediaType == "multipart/form-data":
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		err = r.ParseMultipartForm(maxBody) // holds it all: no temporary file
	case len(body) > 0:
		return http.StatusUnsupportedMediaType, "the body is not a form: send application/x-www-form-urlencoded"
	}
	if r.Form = r.PostForm; err == nil && r.URL.RawQuery != "" {
		r.Form = nil
		err = r.ParseForm() // adds the query
	}
	if err != nil {
		return http.StatusBadRequest, "the form does not decode: " + err.Error()
	}
	return http.StatusOK, ""
}

// requestBase is the URL by which a client reached this server: what a proxy forwards, its first
// entry being the client's, else what the request itself says. It is empty where that is not valid.
func requestBase(r *http.Request) string {
	proto, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Proto"), ",")
	host, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Host"), ",")
	scheme := "http"
	if strings.TrimSpace(proto) == "https" {
		scheme = "https"
	}
	base := scheme + "://" + cmp.Or(strings.TrimSpace(host), r.Host)
	if strings.Count(base, "/") > 2 || !isBaseURL(base) {
		return ""
	}
	return base
}

// hasLogin tells whether the request has this user:password. An empty login fits none.
func hasLogin(r *http.Request, login string) bool {
	user, password, ok := r.BasicAuth()
	got, want := sha256.Sum256([]byte(user+":"+password)), sha256.Sum256([]byte(login))
	return ok && hmac.Equal(got[:], want[:])
}

// isSigned tells whether a V3 signature of the request's, which can have one for each auth token, is
// of the URL called, its form and its nonce (Plivo's "Signature Validation"). Refused is what plivo-go
// leaves unsigned: a fragment, and with a query a name's second value, or dots and "&" at an end.
func isSigned(r *http.Request, called, authToken string) bool {
	nonce := r.Header.Get("X-Plivo-Signature-V3-Nonce")
	if nonce == "" || len(r.Form) > maxSigned || strings.Contains(called, "#") {
		return false
	}
	params, last := make(map[string]string, len(r.PostForm)), ""
	for name, values := range r.PostForm {
		params[name] = strings.Join(values, name)
		last = max(last, name)
	}
	for _, values := range r.URL.Query() {
		if len(values) > 1 || strings.TrimRight(values[0], ".&") != values[0] || strings.HasSuffix(last+params[last], ".") {
			return false
		}
	}
	want := []byte(plivo.ComputeSignatureV3(authToken, called, r.Method, nonce, params))
	signatures := r.Header.Get("X-Plivo-Signature-V3") + "," + r.Header.Get("X-Plivo-Signature-Ma-V3")
	return slices.ContainsFunc(strings.Split(signatures, ","), func(signature string) bool {
		return hmac.Equal([]byte(strings.TrimSpace(signature)), want)
	})
}
