// Dialstatus reports what became of every call that Plivo forwards. It is
// Plivo's guide "Dial Status Reporting Using Go", made fit for real calls:
//
//	POST /dialstatus/         the answer URL: a call gets the XML that dials;
//	                          its called legs and its end are reported, too
//	POST /dialstatus/action/  the <Dial>'s action URL: what became of it is
//	                          reported, and the call gets the XML that follows
//
// Titles in quotes below are pages of Plivo's documentation.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"html"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-martini/martini"
	"github.com/plivo/plivo-go/v7/xml"
)

const (
	maxBody       = 16 << 10       // bytes of a body; Plivo sends less than 1 KiB
	maxValue      = 256            // bytes of a value in the log, and of a reason
	maxRejections = 20             // logged in a second
	exampleNumber = "+12025550123" // reserved for fiction: nobody answers it
	formType      = "application/x-www-form-urlencoded"
)

func main() {
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "dialstatus takes no arguments. These variables configure it:")
		for _, v := range variables {
			fmt.Fprintf(os.Stderr, "\n%s (default %q)\n    %s\n", v.name, v.byDefault, v.want)
		}
	}
	flag.CommandLine.SetOutput(io.Discard) // flag shows a wrong argument, perhaps a secret
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run serves until SIGTERM or SIGINT, and then lets requests finish, for four
// seconds at most. Its error says why the server could not start or go on.
func run() error {
	signal.Ignore(syscall.SIGPIPE) // writing to a closed stdout is an error, not the end
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	cfg, err := configure(os.Getenv)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.address)
	if err != nil {
		return fmt.Errorf("HOST and PORT: %w", err)
	}
	log := slog.New(slog.NewJSONHandler(&logWriter{stdout: os.Stdout, stderr: os.Stderr}, nil))
	log.Info("listening", "address", listener.Addr().String())
	if cfg.dialTo == exampleNumber {
		log.Warn("DIAL_TO is not set, or is the example: nobody will answer")
	}
	if cfg.authToken == "" {
		log.Warn("PLIVO_AUTH_TOKEN is not set: anyone is answered, with PHLO_BASIC_AUTH or without")
	}
	app := newApp(cfg, log)
	server := newServer(app)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-signals:
		go func() { <-signals; os.Exit(1) }() // another signal ends the process at once
	}

	// Shutdown closes idle connections, and a request that was just sent on one
	// gets no answer. So, for a second, answers ask clients to close theirs.
	app.stopping.Store(true)
	time.Sleep(time.Second)
	listener.Close()
	time.Sleep(300 * time.Millisecond) // for requests on connections just accepted
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	server.Shutdown(ctx) // what is unfinished then ends with the process
	return nil
}

// newServer returns the app's server with its limits.
func newServer(a *app) *http.Server {
	return &http.Server{
		Handler:           a,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelError),
		MaxHeaderBytes:    12 << 10, // net/http adds 4 KiB: 16 in all
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,  // header and body
		WriteTimeout:      15 * time.Second,  // longer, so that a slow body gets its 400
		IdleTimeout:       620 * time.Second, // longer than Google's load balancer's 600 s
	}
}

// config is what the environment says, checked.
type config struct {
	address     string // where to listen, host:port
	dialTo      string // E.164 numbers and SIP URIs, separated by commas
	callerID    string // the number that the called party sees
	dialTimeout int    // seconds to let it ring
	publicURL   string // the URL by which Plivo reaches this server, up to /dialstatus/
	authToken   string // the key with which Plivo signs
	basicAuth   string // user:password of PHLO's HTTP Request node
}

// variables lists the environment variables, and what each must be.
var variables = []struct {
	name, byDefault  string
	required, secret bool // required: in production
	isValid          func(value string) bool
	want             string
}{
	{name: "DIAL_TO", byDefault: exampleNumber, required: true,
		isValid: matches(dialable + `(,` + dialable + `)*`),
		want:    "E.164 numbers, country code first, and sip: URIs, separated by commas"},
	{name: "CALLER_ID", isValid: matches(number), want: "an E.164 number of your account"},
	{name: "DIAL_TIMEOUT", isValid: matches(`[1-9][0-9]{0,8}`), want: "seconds, at least 1"},
	{name: "PUBLIC_URL", required: true, isValid: isBaseURL,
		want: "the http or https URL by which Plivo calls this server, up to /dialstatus/"},
	{name: "HOST", isValid: matches(`\S+`), want: "a name or an address to listen on"},
	{name: "PORT", byDefault: "8080", isValid: matches(`[0-9]+`), want: "a port number"},
	{name: "PLIVO_AUTH_TOKEN", required: true, secret: true, isValid: matches(`[^\s"']+`),
		want: "the auth token as the console shows it, without quotes or white space"},
	{name: "PHLO_BASIC_AUTH", secret: true, isValid: matches(userPass),
		want: "user:password, without quotes or white space around it"},
	{name: "MARTINI_ENV", byDefault: martini.Dev,
		isValid: matches(`development|test|production`), want: "development, test or production"},
}

const (
	number   = `\+?[1-9][0-9]{6,14}` // E.164
	sipPart  = `[!#-+\--;=?A-~]+`    // printable ASCII, which XML can hold, but for space " , < > @
	dialable = `\s*(` + number + `|sip:` + sipPart + `@` + sipPart + `)\s*`
	userPass = `[^:"' [:cntrl:]][^:[:cntrl:]]*:[^[:cntrl:]]*[^"' [:cntrl:]]`
	httpURL  = `https?://([A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?(/[\w.~%/-]*)?`
)

// matches returns a function that reports whether all of a text matches.
func matches(pattern string) func(text string) bool {
	return regexp.MustCompile(`^(` + pattern + `)$`).MatchString
}

// isBaseURL reports whether a text is a URL to which the routes can be added.
func isBaseURL(text string) bool {
	u, err := url.Parse(text)
	return err == nil && matches(httpURL)(text) && !strings.Contains(u.Path+"/", "/dialstatus/")
}

// configure reads and checks the environment. Its error has a line for every
// problem, with the value unless that may hold a password.
func configure(getenv func(string) string) (config, error) {
	values := make(map[string]string)
	var errs []error
	for _, v := range variables {
		value := getenv(v.name)
		values[v.name] = cmp.Or(value, v.byDefault)
		if value == "" && v.required && getenv("MARTINI_ENV") == martini.Prod {
			errs = append(errs, errors.New(v.name+" is not set: MARTINI_ENV=production needs it"))
		}
		if value != "" && !v.isValid(value) {
			if v.secret || strings.Contains(value, "@") {
				value = "(not shown)"
			}
			errs = append(errs, fmt.Errorf("%s %q: want %s", v.name, value, v.want))
		}
	}
	dialTimeout, _ := strconv.Atoi(values["DIAL_TIMEOUT"]) // 0 where it is not set
	return config{
		address:     net.JoinHostPort(strings.Trim(values["HOST"], "[]"), values["PORT"]),
		dialTo:      values["DIAL_TO"],
		callerID:    values["CALLER_ID"],
		dialTimeout: dialTimeout,
		publicURL:   strings.TrimRight(values["PUBLIC_URL"], "/"),
		authToken:   values["PLIVO_AUTH_TOKEN"],
		basicAuth:   values["PHLO_BASIC_AUTH"],
	}, errors.Join(errs...)
}

// An app answers Plivo's requests and reports what they say.
type app struct {
	config
	log      *slog.Logger
	handler  http.Handler // Martini, with the routes
	callXML  string       // the answer to a call; used if PUBLIC_URL is set
	stopping atomic.Bool  // whether the server is about to end

	mu         sync.Mutex // guards the two below
	rejectedAt int64      // Unix time of the last rejection
	rejections int        // in that second
}

// newApp returns the app. Martini serves a path with a slash at its end, too.
func newApp(cfg config, log *slog.Logger) *app {
	a := &app{config: cfg, log: log, callXML: dialXML(cfg, cfg.publicURL)}
	routes := martini.NewRouter()
	routes.Post("/dialstatus", a.checked(a.answer))
	routes.Post("/dialstatus/action", a.checked(a.action))
	routes.Get("/", func() string { return "dialstatus runs, and takes calls at /dialstatus/\n" })
	routes.NotFound(func(w http.ResponseWriter, r *http.Request) {
		status := http.StatusNotFound
		if allowed := routes.MethodsFor(r.URL.Path); len(allowed) > 0 {
			status = http.StatusMethodNotAllowed
			w.Header().Set("Allow", strings.Join(allowed, ", "))
		}
		a.reject(w, r, status, "dialstatus runs, but takes no "+r.Method+" here: "+
			"send POST to /dialstatus/ or /dialstatus/action/, "+
			"such as curl -d CallStatus=ringing "+a.baseURL(r)+"/dialstatus/")
	})
	m := martini.New()
	m.Action(routes.Handle)
	a.handler = m
	return a
}

// ServeHTTP answers, and ends the connection if the server is about to end.
func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if a.stopping.Load() {
		w.Header().Set("Connection", "close")
	}
	a.handler.ServeHTTP(w, r)
}

// answer serves the answer URL: a call gets the <Dial>. What its called legs do
// ("Dial XML") and its end ("Application API") are reported here, too.
func (a *app) answer(w http.ResponseWriter, r *http.Request) {
	document := emptyXML
	switch {
	case r.FormValue("DialAction") != "":
		a.report(r, slog.LevelInfo, "leg", "DialAction", "DialALegUUID", "DialBLegUUID",
			"DialBLegTo", "DialBLegStatus", "DialBLegDuration", "DialBLegHangupCause",
			"DialBLegHangupCauseName", "DialBLegHangupSource", "CallUUID")
	case r.FormValue("Event") == "Hangup" || callIsOver[r.FormValue("CallStatus")]:
		a.report(r, slog.LevelInfo, "hangup", "CallUUID", "From", "To", "Direction",
			"CallStatus", "HangupCause", "HangupCauseName", "HangupSource", "Duration")
	default:
		a.report(r, slog.LevelInfo, "call", "CallUUID", "From", "To", "Direction", "CallStatus")
		document = a.callXML
		if a.publicURL == "" {
			document = dialXML(a.config, a.baseURL(r))
		}
	}
	w.Header().Set("Content-Type", "application/xml")
	io.WriteString(w, document)
}

// action serves the action URL: what became of the <Dial> is reported, and
// decides what follows ("Dial XML").
func (a *app) action(w http.ResponseWriter, r *http.Request) {
	status := r.FormValue("DialStatus")
	if status == "" {
		a.reject(w, r, http.StatusBadRequest, "no DialStatus: send the form that Plivo posts here")
		return
	}
	level := slog.LevelInfo
	followUp, known := followUps[status]
	if !known {
		level, followUp = slog.LevelWarn, farewell("The call has ended.")
	}
	a.report(r, level, "dial", "DialStatus", "DialALegUUID", "DialBLegUUID",
		"DialRingStatus", "DialHangupCause", "CallUUID", "From", "To")
	w.Header().Set("Content-Type", "application/xml")
	io.WriteString(w, followUp)
}

var (
	// callIsOver has each CallStatus of a call that has ended.
	callIsOver = map[string]bool{"completed": true, "busy": true, "failed": true,
		"timeout": true, "no-answer": true, "cancel": true}

	// followUps has the document that follows each DialStatus.
	followUps = map[string]string{
		"completed": responseXML(new(xml.HangupElement)),
		"cancel":    responseXML(new(xml.HangupElement)),
		"busy":      farewell("The line is busy. Please try again later."),
		"no-answer": farewell("Nobody answered. Please try again later."),
		"timeout":   farewell("The call could not be connected in time. Please try again later."),
		"failed":    farewell("The call could not be connected."),
	}
	emptyXML = responseXML()
)

// farewell returns the XML that says a sentence and hangs up.
func farewell(sentence string) string {
	return responseXML(new(xml.SpeakElement).AddSpeak(sentence), new(xml.HangupElement))
}

// dialXML returns the XML for a call, its URLs fully qualified ("Dial XML").
func dialXML(cfg config, baseURL string) string {
	var destinations []any
	for destination := range strings.SplitSeq(cfg.dialTo, ",") {
		// plivo-go escapes attributes and <Speak>, not <Number> and <User>.
		destination = html.EscapeString(strings.TrimSpace(destination))
		if strings.HasPrefix(destination, "sip:") {
			destinations = append(destinations, new(xml.UserElement).SetContents(destination))
		} else {
			destinations = append(destinations, new(xml.NumberElement).SetContents(destination))
		}
	}
	dial := new(xml.DialElement).
		SetAction(baseURL + "/dialstatus/action/").
		SetMethod(http.MethodPost).
		SetRedirect(true).
		SetCallbackUrl(baseURL + "/dialstatus/").
		SetCallbackMethod(http.MethodPost).
		SetContents(destinations)
	if cfg.callerID != "" {
		dial = dial.SetCallerID(cfg.callerID) // setters return a copy
	}
	if cfg.dialTimeout > 0 {
		dial = dial.SetTimeout(cfg.dialTimeout)
	}
	return responseXML(dial)
}

// responseXML returns a document with these elements.
func responseXML(elements ...any) string {
	return xml.ResponseElement{Contents: elements}.String()
}

// checked returns a handler that rejects a request or calls next, with the form
// in r.PostForm, and query and form in r.Form. r.ParseForm is not used: it is
// slower, and treats a body of another type as an empty form.
func (a *app) checked(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
		mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
		form, formErr := url.ParseQuery(string(body))
		query, queryErr := url.ParseQuery(r.URL.RawQuery)
		r.Form, r.PostForm = form, form
		if len(query) > 0 {
			maps.Copy(query, form) // if a field is in both, the body's counts
			r.Form = query
		}
		switch {
		case len(body) > maxBody:
			a.reject(w, r, http.StatusRequestEntityTooLarge,
				fmt.Sprintf("the body is too long: send %d bytes at most", maxBody))
		case err != nil:
			a.reject(w, r, http.StatusBadRequest, "the body broke off: send all of it, at once")
		case len(body) > 0 && !strings.EqualFold(strings.TrimSpace(mediaType), formType):
			a.reject(w, r, http.StatusUnsupportedMediaType, "this is not a form: send "+formType)
		case formErr != nil || queryErr != nil:
			a.reject(w, r, http.StatusBadRequest, "this does not decode: send %25 for %, %3B for ;")
		case !a.authorized(r):
			a.reject(w, r, http.StatusForbidden,
				"forbidden: Plivo has not signed this. If it called another URL, set PUBLIC_URL; "+
					"if not, PLIVO_AUTH_TOKEN is not that of the number's account")
		default:
			next(w, r)
		}
	}
}

// authorized reports whether to serve a request: Plivo or PHLO sent it, or no
// token is set. An empty basicAuth equals no login, as a login has a colon.
func (a *app) authorized(r *http.Request) bool {
	user, password, _ := r.BasicAuth()
	isPHLO := hmac.Equal([]byte(user+":"+password), []byte(a.basicAuth))
	return a.authToken == "" || isPHLO || a.isSigned(r)
}

// isSigned reports whether the auth token made one of the V3 signatures
// ("Signature Validation"). plivo-go's check ignores parts of some requests.
func (a *app) isSigned(r *http.Request) bool {
	nonce := r.Header.Get("X-Plivo-Signature-V3-Nonce")
	if nonce == "" || strings.Contains(nonce, ".") {
		return false // with a dot, the end of a captured form could be in it
	}
	mac := hmac.New(sha256.New, []byte(a.authToken))
	mac.Write(signedText(r, a.baseURL(r), nonce))
	want := base64.StdEncoding.EncodeToString(mac.Sum(nil))
	headers := slices.Concat( // each may be repeated, or hold a list
		r.Header.Values("X-Plivo-Signature-V3"), r.Header.Values("X-Plivo-Signature-Ma-V3"))
	for signature := range strings.SplitSeq(strings.Join(headers, ","), ",") {
		if hmac.Equal([]byte(strings.TrimSpace(signature)), []byte(want)) {
			return true
		}
	}
	return false
}

// signedText returns what Plivo signs of a POST ("Signature Validation"): the
// URL as it was called, query and form decoded and sorted, and the nonce.
func signedText(r *http.Request, baseURL, nonce string) []byte {
	query, form := r.URL.Query(), r.PostForm
	text := bytes.NewBuffer(make([]byte, 0, 1024)) // enough for what Plivo sends
	text.WriteString(baseURL + r.URL.EscapedPath())
	if len(query)+len(form) > 0 {
		text.WriteString("?")
	}
	writeSorted(text, query, "=", "&")
	if len(query) > 0 && len(form) > 0 {
		text.WriteString(".")
	}
	writeSorted(text, form, "", "")
	text.WriteString("." + nonce)
	return text.Bytes()
}

// writeSorted writes parameters sorted by name, and then by value.
func writeSorted(text *bytes.Buffer, params url.Values, equals, ampersand string) {
	pairs := make([][2]string, 0, len(params))
	for name, values := range params {
		for _, value := range values {
			pairs = append(pairs, [2]string{name, value})
		}
	}
	slices.SortFunc(pairs, func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	for i, pair := range pairs {
		if i > 0 {
			text.WriteString(ampersand)
		}
		text.WriteString(pair[0])
		text.WriteString(equals)
		text.WriteString(pair[1])
	}
}

// baseURL returns the URL by which Plivo reached this server, up to the route:
// PUBLIC_URL, else what the first proxy says, else what the request says.
func (a *app) baseURL(r *http.Request) string {
	if a.publicURL != "" {
		return a.publicURL
	}
	proto, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Proto"), ",")
	host, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Host"), ",")
	host = cmp.Or(strings.TrimSpace(host), r.Host)
	if strings.EqualFold(strings.TrimSpace(proto), "https") {
		return "https://" + strings.TrimSuffix(host, ":443")
	}
	return "http://" + strings.TrimSuffix(host, ":80")
}

// report logs one record with these fields of the form.
func (a *app) report(r *http.Request, level slog.Level, record string, fields ...string) {
	attributes := make([]slog.Attr, len(fields))
	for i, field := range fields {
		attributes[i] = slog.String(field, cut(r.FormValue(field)))
	}
	a.log.LogAttrs(r.Context(), level, record, attributes...)
}

// reject answers why a request is not served, and logs it, up to maxRejections
// in a second: a flood must not push reports out of the log.
func (a *app) reject(w http.ResponseWriter, r *http.Request, status int, reason string) {
	a.mu.Lock()
	now := time.Now().Unix()
	if a.rejectedAt != now {
		a.rejectedAt, a.rejections = now, 0
	}
	a.rejections++
	logged := a.rejections <= maxRejections
	a.mu.Unlock()
	if logged {
		a.log.Warn("rejected", "status", status, "reason", cut(reason), "path", cut(r.URL.Path),
			"url", cut(a.baseURL(r)+r.URL.RequestURI()), "peer", r.RemoteAddr,
			"X-Forwarded-For", cut(strings.Join(r.Header.Values("X-Forwarded-For"), ", ")))
	}
	http.Error(w, cut(reason), status)
}

// cut returns the first maxValue bytes of a text.
func cut(text string) string { return text[:min(len(text), maxValue)] }

// A logWriter writes records to stdout; what stdout does not take, to stderr.
type logWriter struct {
	stdout, stderr io.Writer
	torn           bool // stdout ends inside a record
}

// Write takes one whole record at a time. Its error is that of stderr.
func (l *logWriter) Write(record []byte) (int, error) {
	line := record
	if l.torn {
		line = append([]byte("\n"), record...)
	}
	n, err := l.stdout.Write(line)
	if n > 0 {
		l.torn = line[n-1] != '\n'
	}
	if err != nil {
		slog.New(slog.NewJSONHandler(l.stderr, nil)).Error("stdout failed", "cause", err)
		return l.stderr.Write(record)
	}
	return len(record), nil
}
