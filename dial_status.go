// Dialstatus reports what became of every call that Plivo forwards. It is Plivo's guide
// "Dial Status Reporting Using Go", made fit for real calls:
//
//	POST /dialstatus/        the answer URL. A call gets the XML that dials the configured
//	                         destinations; the end of a call gets an empty <Response>.
//	POST /dialstatus/action  the action URL of that <Dial>. What became of it is one record in
//	                         the log; the answer is the XML that carries the call on.
//
// The environment configures it: the table is in README.md.
package main

import (
	"cmp"
	"context"
	encodingxml "encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-martini/martini"
	"github.com/plivo/plivo-go/v7/xml"
)

func main() {
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
	listener, err := net.Listen("tcp", net.JoinHostPort(cfg.host, cfg.port))
	if err != nil {
		return fmt.Errorf("HOST %q, PORT %q: %w", cfg.host, cfg.port, err)
	}
	log := slog.New(slog.NewJSONHandler(stdout, nil))
	log.Info("listening", "address", listener.Addr().String())
	for _, warning := range cfg.warnings {
		log.Warn(warning)
	}

	server := &http.Server{
		Handler:  newApp(cfg, log),
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	stopped := make(chan error, 1)
	context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		stopped <- server.Shutdown(grace)
	})
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}

// config is what the environment says, checked.
type config struct {
	host, port string
	publicURL  string          // no slash at its end; empty: taken from each request
	dial       xml.DialElement // complete but for the action URL
	warnings   []string        // to be logged at start-up
}

const fictionalNumber = "+12025550123"

var (
	e164     = regexp.MustCompile(`^\+?[1-9][0-9]{6,14}$`)
	sipURI   = regexp.MustCompile(`^sip:[!#-;=?A-~]+@[!#-;=?A-~]+$`) // printable, no " < > @
	hostPort = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?$`)
)

// configure reads and checks the environment. Its error has a line for every problem: the
// variable, its value, and what is wanted.
func configure(getenv func(string) string) (config, error) {
	var problems []error
	bad := func(variable, value, want string) {
		problems = append(problems, fmt.Errorf("%s %q: want %s", variable, value, want))
	}
	cfg := config{host: getenv("HOST"), port: cmp.Or(getenv("PORT"), "8080")}
	if _, err := strconv.ParseUint(cfg.port, 10, 16); err != nil {
		bad("PORT", cfg.port, "a port number, or 0 for any free port")
	}

	dialTo := getenv("DIAL_TO")
	if dialTo == "" {
		dialTo = fictionalNumber
		cfg.warnings = append(cfg.warnings, "DIAL_TO is not set: calls are forwarded to "+dialTo+", a number reserved for fiction")
	}
	var destinations []any
	for destination := range strings.SplitSeq(dialTo, ",") {
		switch destination = strings.TrimSpace(destination); {
		case e164.MatchString(destination):
			destinations = append(destinations, new(xml.NumberElement).SetContents(escape(destination)))
		case sipURI.MatchString(destination):
			destinations = append(destinations, new(xml.UserElement).SetContents(escape(destination)))
		default:
			bad("DIAL_TO", destination, "E.164 numbers (+12025550123) and SIP URIs (sip:user@example.com), separated by commas")
		}
	}
	cfg.dial = new(xml.DialElement).SetMethod(http.MethodPost).SetRedirect(true).SetContents(destinations)
	if callerID := getenv("CALLER_ID"); e164.MatchString(callerID) {
		cfg.dial = cfg.dial.SetCallerID(callerID)
	} else if callerID != "" {
		bad("CALLER_ID", callerID, "an E.164 number (+12025550123)")
	}
	if timeout := getenv("DIAL_TIMEOUT"); timeout != "" {
		seconds, err := strconv.Atoi(timeout)
		if err != nil || seconds < 1 {
			bad("DIAL_TIMEOUT", timeout, "whole seconds, at least 1")
		}
		cfg.dial = cfg.dial.SetTimeout(seconds)
	}

	if public := getenv("PUBLIC_URL"); public != "" {
		u, err := parseBase(public)
		if err != nil {
			withoutUser := public[strings.LastIndex(public, "@")+1:] // a password is not printed
			bad("PUBLIC_URL", withoutUser, "http or https, a host, perhaps a path; no user, query or fragment")
		} else {
			cfg.publicURL = u.Scheme + "://" + u.Host + strings.TrimRight(u.EscapedPath(), "/")
		}
	}
	return cfg, errors.Join(problems...)
}

// Martini matches a pattern with and without a slash at its end.
const (
	answerPath = "/dialstatus"
	actionPath = "/dialstatus/action"
)

// newApp is the Martini app: the two routes, and 405 or 404 for the rest. What every request
// needs stands around Martini and not in its middleware, which costs reflection on each.
func newApp(cfg config, log *slog.Logger) http.Handler {
	routes := martini.NewRouter()
	routes.Post(answerPath, withForm(log, answer(cfg, log)))
	routes.Post(actionPath, withForm(log, action(log)))
	routes.NotFound(func(w http.ResponseWriter, r *http.Request) {
		if allowed := strings.Join(routes.MethodsFor(r.URL.Path), ", "); allowed != "" {
			w.Header().Set("Allow", allowed)
			reject(w, r, log, http.StatusMethodNotAllowed, r.Method+" is not allowed here: send "+allowed)
			return
		}
		reject(w, r, log, http.StatusNotFound, "not found: send to "+answerPath+"/ or "+actionPath+"/")
	})
	app := martini.New()
	app.Action(routes.Handle)
	return contained(app, log)
}

// answer is the answer URL: it answers a call with the <Dial>. Plivo calls it once more when the
// call is over, unless the application has a hangup URL of its own (Plivo's "Application API"):
// that is answered with an empty <Response>. 400: no action URL can be made of the host.
func answer(cfg config, log *slog.Logger) http.HandlerFunc {
	over, dial := document(), dialDocument(cfg.dial, cfg.publicURL)
	return func(w http.ResponseWriter, r *http.Request) {
		if callIsOver[r.FormValue("CallStatus")] {
			report(r, log, slog.LevelInfo, "hangup", hangupFields)
			writeXML(w, over)
			return
		}
		dial := dial
		if cfg.publicURL == "" {
			base, err := baseURL(r)
			if err != nil {
				reject(w, r, log, http.StatusBadRequest, err.Error())
				return
			}
			dial = dialDocument(cfg.dial, base)
		}
		report(r, log, slog.LevelInfo, "call", callFields)
		writeXML(w, dial)
	}
}

// action is the action URL: it reports what became of the <Dial> and answers with what follows.
// 400: there is no DialStatus.
func action(log *slog.Logger) http.HandlerFunc {
	documents := make(map[string][]byte, len(followUps))
	for status, elements := range followUps {
		documents[status] = document(elements...)
	}
	return func(w http.ResponseWriter, r *http.Request) {
		status := r.FormValue("DialStatus")
		if status == "" {
			reject(w, r, log, http.StatusBadRequest, "DialStatus is missing: send the form that Plivo posts to a Dial's action URL")
			return
		}
		level, followUp := slog.LevelInfo, documents[status]
		if followUp == nil {
			level, followUp = slog.LevelWarn, documents[anyOther]
		}
		report(r, log, level, "dial", dialFields)
		writeXML(w, followUp)
	}
}

const anyOther = ""

// followUps is what follows each DialStatus. The caller hears nothing where the conversation is
// over or the caller has gone.
var followUps = map[string][]any{
	"completed": {hangup},
	"cancel":    {hangup},
	"busy":      {speak("The line is busy. Please try again later."), hangup},
	"no-answer": {speak("Nobody answered. Please try again later."), hangup},
	"timeout":   {speak("The call could not be connected in time. Please try again later."), hangup},
	"failed":    {speak("The call could not be connected."), hangup},
	anyOther:    {speak("The call has ended."), hangup},
}

var (
	hangup = new(xml.HangupElement)
	speak  = new(xml.SpeakElement).AddSpeak
)

// callIsOver has each CallStatus that Plivo sends when a call is over.
var callIsOver = map[string]bool{
	"completed": true, "busy": true, "failed": true, "timeout": true, "no-answer": true, "cancel": true,
}

// What each record reports: Plivo's fields by their names, which are the log's keys.
var (
	callFields   = []string{"CallUUID", "From", "To", "Direction", "CallStatus"}
	hangupFields = []string{"CallUUID", "From", "To", "Direction", "CallStatus", "HangupCause", "Duration"}
	dialFields   = []string{"DialStatus", "DialALegUUID", "DialBLegUUID", "DialRingStatus", "DialHangupCause", "CallUUID", "From", "To"}
)

// report logs one record with these fields of the form.
func report(r *http.Request, log *slog.Logger, level slog.Level, message string, fields []string) {
	attrs := make([]slog.Attr, len(fields))
	for i, field := range fields {
		attrs[i] = slog.String(field, r.FormValue(field))
	}
	log.LogAttrs(r.Context(), level, message, attrs...)
}

// dialDocument is the answer to a call. An action is a fully qualified URL (Plivo's "Dial XML").
func dialDocument(dial xml.DialElement, base string) []byte {
	return document(dial.SetAction(base + actionPath + "/"))
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

// escape makes a text safe where plivo-go writes it raw: in <Number> and <User>.
func escape(text string) string {
	var escaped strings.Builder
	encodingxml.EscapeText(&escaped, []byte(text))
	return escaped.String()
}

func writeXML(w http.ResponseWriter, document []byte) {
	w.Header().Set("Content-Type", "application/xml")
	w.Write(document)
}

// reject answers a request that is not served with a plain line, and logs the same as the reason.
func reject(w http.ResponseWriter, r *http.Request, log *slog.Logger, status int, reason string) {
	log.Warn("rejected", "status", status, "reason", reason, "path", r.URL.Path)
	http.Error(w, reason, status)
}

// contained answers a plain 500 when a handler panics.
func contained(next http.Handler, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if cause := recover(); cause != nil {
				log.Error("panic", "cause", fmt.Sprint(cause), "stack", string(debug.Stack()), "path", r.URL.Path)
				http.Error(w, "internal server error", http.StatusInternalServerError)
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// withForm reads the form, the query's and a urlencoded or multipart body's, for a handler.
// 400: it does not decode.
func withForm(log *slog.Logger, next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var err error
		if mediaType, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); mediaType == "multipart/form-data" {
			err = r.ParseMultipartForm(1 << 20)
		} else {
			err = r.ParseForm()
		}
		if err != nil {
			reject(w, r, log, http.StatusBadRequest, "the form does not decode: "+err.Error())
			return
		}
		next(w, r)
	}
}

// baseURL is the URL by which Plivo reached this server where PUBLIC_URL does not say it: from the
// first entry, the client's side, of a proxy's X-Forwarded-Proto and X-Forwarded-Host, else from
// the request itself. Its error says that they make no valid URL.
func baseURL(r *http.Request) (string, error) {
	scheme := "http"
	if proto := firstEntry(r, "X-Forwarded-Proto"); proto == "http" || proto == "https" {
		scheme = proto
	}
	base := scheme + "://" + cmp.Or(firstEntry(r, "X-Forwarded-Host"), r.Host)
	if u, err := parseBase(base); err != nil || u.Path != "" {
		return "", errors.New("bad Host or X-Forwarded-Host: send a host name or an address, perhaps with a port")
	}
	return base, nil
}

// firstEntry is the first entry of a header that can hold several, separated by commas.
func firstEntry(r *http.Request, header string) string {
	entry, _, _ := strings.Cut(r.Header.Get(header), ",")
	return strings.TrimSpace(entry)
}

// parseBase parses a URL that is http or https, a host, perhaps a path, and nothing else.
func parseBase(base string) (*url.URL, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, err
	}
	_, badPort := strconv.ParseUint(cmp.Or(u.Port(), "0"), 10, 16)
	if u.Scheme != "http" && u.Scheme != "https" || !hostPort.MatchString(u.Host) || badPort != nil || u.User != nil || strings.ContainsAny(base, "?#") {
		return nil, errors.New("not a base URL")
	}
	return u, nil
}
